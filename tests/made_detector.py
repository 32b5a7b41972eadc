"""A detector file made by hand, with YOLOX's layout: whatever is bright is a person, a box for each bright cell.

64x64 pixels; on each of the three grids a convolution as large as its cell gives (0.5, 0.5, 0, 0, brightness, 1): the
box is the cell itself, its score the cell's mean brightness / 255. ONNX is a protocol buffer, written here field by
field (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), so that no ONNX library is needed.
"""

import struct

import numpy as np

SIDE = 64
FLOAT, INT64 = 1, 7


def detector_bytes(batch: int | None = 1, side: int = SIDE) -> bytes:
    """The file; `batch` None: any number of pictures at once."""
    initializers, nodes = [_tensor("flat", np.array([0, 6, -1], np.int64))], []
    for stride in (8, 16, 32):
        weights = np.zeros((6, 3, stride, stride), np.float32)
        weights[4] = 1 / (3 * stride * stride * 255)
        initializers.append(_tensor(f"w{stride}", weights))
        initializers.append(_tensor(f"b{stride}", np.array([0.5, 0.5, 0, 0, 0, 1], np.float32)))
        nodes.append(_node("Conv", ["images", f"w{stride}", f"b{stride}"], f"cells{stride}",
                           kernel_shape=[stride] * 2, strides=[stride] * 2))
        nodes.append(_node("Reshape", [f"cells{stride}", "flat"], f"rows{stride}"))
    nodes.append(_node("Concat", ["rows8", "rows16", "rows32"], "columns", axis=2))
    nodes.append(_node("Transpose", ["columns"], "output", perm=[0, 2, 1]))
    graph = b"".join([*(_inner(1, node) for node in nodes), _text(2, "made"), *(_inner(5, one) for one in initializers),
                      _inner(11, _value("images", [batch, 3, side, side])),
                      _inner(12, _value("output", [batch, 21 * (side // 32) ** 2, 6]))])
    return _number(1, 7) + _inner(7, graph) + _inner(8, _number(2, 13))  # IR version, graph, operator set


def _tensor(name: str, values: np.ndarray) -> bytes:
    kind = INT64 if values.dtype == np.int64 else FLOAT
    dims = b"".join(_number(1, side) for side in values.shape)
    return dims + _number(2, kind) + _text(8, name) + _inner(9, values.tobytes())


def _node(operator: str, inputs: list[str], output: str, **attributes: int | list[int]) -> bytes:
    body = b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, operator)
    for name, value in attributes.items():
        if isinstance(value, int):
            body += _inner(5, _text(1, name) + _number(3, value) + _number(20, 2))
        else:
            body += _inner(5, _text(1, name) + b"".join(_number(8, one) for one in value) + _number(20, 7))
    return body


def _value(name: str, shape: list[int | None]) -> bytes:
    dims = b"".join(_inner(1, _text(2, "n") if side is None else _number(1, side)) for side in shape)
    return _text(1, name) + _inner(2, _inner(1, _number(1, FLOAT) + _inner(2, dims)))


def _inner(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _text(field: int, text: str) -> bytes:
    return _inner(field, text.encode())


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    digits = []
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return struct.pack(f"{len(digits) + 1}B", *digits, value)
