"""Copies of whole files with other numbers in them: the module tree, code and configuration stay to the bit.

A full-module pickle, a TorchScript archive and a Keras model are more than their tensors, and kruify can neither run
nor rebuild what is more. It copies the file and puts the new numbers where the old ones were. ONNX: onnx_in_place.py.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kruify.checkpoint import keras_file
from kruify.checkpoint.archive import Archive
from kruify.checkpoint.file_bytes import chunks
from kruify.checkpoint.gates import keras_from_torch
from kruify.checkpoint.storage import Storage
from kruify.checkpoint.tensors import LazyTensor
from kruify.checkpoint.writing import atomic_file, tensor_bytes
from kruify.errors import UsageError


def replace_in_torch(
    source: Path, stored: Mapping[str, LazyTensor], target: Path, tensors: Mapping[str, LazyTensor]
) -> None:
    """Copy a file that torch wrote, zip or older, with other numbers in its storages.

    Args:
        stored: the tensors of `source` by the names in the file, as its reader gives them.
        tensors: new tensors by the same names, of the same shapes and dtypes.

    Raises: UsageError where a tensor does not fit; names that `source` lacks are refused, too.
    """
    check_fits(source, stored, tensors)
    with source.open("rb") as old, atomic_file(target) as file:
        file.writelines(chunks(old))
        changed = set()
        for name, tensor in tensors.items():
            storage, start, stride = stored[name].place
            _write_view(file, storage, start, stride, tensor.load())
            changed.add(storage.start)
        old.seek(0)
        if old.read(4) == b"PK\x03\x04":
            _correct_sums(source, old, file, changed)


def replace_in_keras(source: Path, target: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Copy a .keras, .weights.h5 or .h5 file with other weights, given by the names of its reader."""
    with source.open("rb") as old:
        if old.read(4) != b"PK\x03\x04":
            found = keras_file.read_h5(source)
            data = _replaced_h5(source, source.read_bytes(), found, tensors)
            with atomic_file(target) as file:
                file.write(data)
            return
        archive = Archive(source, old, source.stat().st_size)
        found = keras_file.read_archive(source, archive)
        with atomic_file(target) as file, zipfile.ZipFile(file, "w") as new:
            for name, entry in archive.entries.items():
                content = b"".join(archive.chunks(name))
                if name == "model.weights.h5":
                    content = _replaced_h5(source, content, found, tensors)
                new.writestr(entry, content)


def _replaced_h5(source: Path, data: bytes, found: keras_file.KerasFile, tensors: Mapping[str, LazyTensor]) -> bytes:
    import h5py

    check_fits(source, found.tensors, tensors)
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        translated = {f"{layer}.{part}{suffix}" for (layer, suffix) in found.parts for part in keras_file.PARTS}
        for name, tensor in tensors.items():
            if name not in translated:
                file[name][...] = tensor.load().numpy()
        for (layer, suffix), (kind, paths, rows) in found.parts.items():
            own = {n.removeprefix(f"{layer}."): t.load() for n, t in tensors.items() if n.startswith(f"{layer}.")}
            if f"weight_hh{suffix}" in own:
                for part, value in keras_from_torch(kind, own, suffix, rows).items():
                    file[paths[part]][...] = value.numpy()
    return buffer.getvalue()


def check_fits(source: Path, stored: Mapping[str, LazyTensor], tensors: Mapping[str, LazyTensor]) -> None:
    """Raises `UsageError` unless every tensor has the name, shape and dtype of one in the file."""
    for name, tensor in tensors.items():
        old = stored.get(name)
        if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            has = "is not there" if old is None else f"is {list(old.shape)} {old.dtype}"
            raise UsageError(
                f"{name} {has}, so a tensor {list(tensor.shape)} {tensor.dtype} cannot take its place",
                source,
                "Give the file that was converted",
            )


def _write_view(file: BinaryIO, storage: Storage, start: int, stride: tuple[int, ...], tensor: Tensor) -> None:
    """Write a tensor through a strided view of a storage, leaving the numbers between as they are."""
    if not tensor.numel():
        return
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True))
    data = bytearray(span * tensor.itemsize)
    file.seek(storage.start + start)
    file.readinto(data)  # type: ignore[attr-defined]
    flat = torch.frombuffer(data, dtype=tensor.dtype)
    flat.as_strided(tensor.shape, stride).copy_(tensor)
    if storage.swap:
        raise UsageError("a big-endian file cannot be written in place", hint="Write a state dict")
    file.seek(storage.start + start)
    file.write(tensor_bytes(flat))


def _correct_sums(source: Path, old: BinaryIO, file: BinaryIO, changed: set[int]) -> None:
    """Put new checksums into the entries of a zip whose bytes have changed: local header, descriptor, directory."""
    archive = Archive(source, old, source.stat().st_size)
    sums: dict[str, int] = {}
    for name, entry in archive.entries.items():
        start = archive.start(name)
        if start not in changed:
            continue
        file.seek(start)
        total = 0
        for chunk in chunks(file, entry.file_size):
            total = zlib.crc32(chunk, total)
        sums[name] = total
        if entry.flag_bits & 0x08:
            file.seek(start + entry.compress_size)
            signed = file.read(4) == b"PK\x07\x08"
            file.seek(start + entry.compress_size + (4 if signed else 0))
            file.write(total.to_bytes(4, "little"))
        file.seek(entry.header_offset + 14)
        file.write((0 if entry.flag_bits & 0x08 else total).to_bytes(4, "little"))
    file.seek(archive.directory)
    for entry in archive.listed:
        at = file.tell()
        header = file.read(46)
        lengths = [int.from_bytes(header[i : i + 2], "little") for i in (28, 30, 32)]
        if entry.filename in sums:
            file.seek(at + 16)
            file.write(sums[entry.filename].to_bytes(4, "little"))
        file.seek(at + 46 + sum(lengths))
