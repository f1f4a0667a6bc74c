"""Blocks of a few bits become the numbers that ggml's own Python package makes of them, bit for bit."""

import struct

import numpy as np
import pytest

from jaxdiff.io.gguf import _BLOCKS, open_gguf

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", _BLOCKS)
def test_blocks_become_ggmls_numbers(tmp_path, kind):
    blocks, rng = _BLOCKS[kind], np.random.default_rng(kind)
    raw = rng.integers(0, 256, (48, blocks.bytes), np.uint8)
    # Any bytes make numbers, but for the scales, which float16 holds: these must be finite.
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for place in scales.get(blocks.name, (0, 2) if blocks.name in ("Q4_1", "Q5_1") else (0,)):
        raw[:, place : place + 2] = rng.normal(size=(48, 1)).astype(np.float16).view(np.uint8)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"a"
    head += struct.pack("<IQQIQ", 2, blocks.size, 48, kind, 0)
    path = tmp_path / "a.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + raw.tobytes())
    found = np.asarray(open_gguf(path)[0]["a"])
    assert found.shape == (48, blocks.size)
    np.testing.assert_array_equal(found, wanted.reshape(48, -1))


def test_what_its_writer_writes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a.weight": rng.normal(size=(6, 64)).astype(np.float32), "b.bias": np.arange(7, dtype=np.float32)}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "sd1")
    writer.add_array("some.words", ["one", "two"])
    writer.add_uint32("general.quantization_version", 2)
    kinds = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q5_1": gguf.GGMLQuantizationType.Q5_1}
    for name, kind in kinds.items():
        stored = gguf.quants.quantize(arrays["a.weight"], kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.add_tensor("b.bias", arrays["b.bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors, said = open_gguf(tmp_path / "a.gguf")
    assert said["general.architecture"] == "sd1"
    np.testing.assert_array_equal(tensors["b.bias"], arrays["b.bias"])
    for name, kind in kinds.items():
        stored = gguf.quants.quantize(arrays["a.weight"], kind)
        np.testing.assert_array_equal(tensors[name], gguf.quants.dequantize(stored, kind))
