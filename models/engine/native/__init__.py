"""The C++ code of the engine, and its build.

kernels.cpp has the operators `torch.ops.parley.*`; program.cpp runs a compiled model.
build.py compiles both for the processor of this machine. It imports only the ground (errors, scratch).
"""
