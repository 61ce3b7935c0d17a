"""The embedded model in two GGUF files for llama.cpp: the published one in Q4_1, and one in Q8_0."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants

from models.language.loader import load
from models.language.model_files import download_embedded
from models.settings import Settings


def gguf_files(folder: Path) -> list[Path]:
    """Both files in a folder; missing ones are made."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "model.Q4_1.gguf", folder / "model.Q8_0.gguf"]
    if not files[0].exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.move(download_embedded(Path(scratch)), files[0])
    if not files[1].exists():
        _to_q8_0(files[0], files[1])
    return files


def transformers_folder(folder: Path) -> Path:
    """A folder with the embedded model for transformers; it is made if it is missing."""
    target = folder / "transformers"
    if not target.exists():
        tokenizer, model = load(Settings(device="cpu", quantize="none"))
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def _to_q8_0(source: Path, target: Path) -> None:
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "general.file_type":
            writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        else:
            whole = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            eight = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quants.quantize(whole, eight), raw_dtype=eight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
