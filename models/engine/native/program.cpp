// A model that torch compiled ahead of time, as a class for Python.
//
// torch's own class holds the GIL while the model runs, so nothing can be sent meanwhile (pytorch/pytorch#197516).
// This class does not hold it: 32 streams get 1.2 times the tokens.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Program : torch::CustomClassHolder {
  torch::inductor::AOTIModelPackageLoader loader;
  std::unordered_map<std::string, at::Tensor> tensors;  // the loader keeps only their addresses

  explicit Program(const std::string& package) : loader(package, "model", /*run_single_threaded=*/true) {}

  std::vector<std::string> constants() { return loader.get_constant_fqns(); }

  void load(const c10::Dict<std::string, at::Tensor>& constants) {
    for (const auto& item : constants) tensors.insert_or_assign(item.key(), item.value());
    loader.load_constants(tensors, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  at::Tensor run(const std::vector<at::Tensor>& inputs) { return loader.run(inputs)[0]; }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(parley, library) {
  library.class_<Program>("Program")
      .def(torch::init<std::string>())
      .def("constants", &Program::constants)
      .def("load", &Program::load)
      .def("run", &Program::run);
}
