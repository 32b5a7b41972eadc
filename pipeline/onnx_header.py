"""What an ONNX file says of its first input, read from its bytes: no ONNX library is needed to look at a file.

ONNX is one protocol-buffer message (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto): fields of a number and a
wire type, https://protobuf.dev/programming-guides/encoding. Only the few on the way to the shape are looked at.
"""

from collections.abc import Iterator

from pipeline.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# ModelProto.graph, GraphProto.input, ValueInfoProto.type, TypeProto.tensor_type, TypeProto.Tensor.shape
_TO_SHAPE = (7, 11, 2, 1, 2)
_DIM, _DIM_VALUE = 1, 1


def input_shape(data: bytes, *, source: str) -> tuple[int | None, ...]:
    """The sides of the file's first input; None for a side that is free. DataError where it is no ONNX file."""
    try:
        message = memoryview(data)
        for number in _TO_SHAPE:
            message = next(value for field, value in _fields(message) if field == number and not isinstance(value, int))
        dims = [value for field, value in _fields(message) if field == _DIM and not isinstance(value, int)]
        return tuple(_side(dim) for dim in dims)
    except (StopIteration, IndexError, ValueError):
        raise DataError(f"{source} is no ONNX file, or says nothing of its input's shape ({len(data)} bytes were "
                        "read). Export the detector again, to ONNX.") from None


def _side(dim: memoryview) -> int | None:
    sides = [value for field, value in _fields(dim) if field == _DIM_VALUE and isinstance(value, int)]
    return sides[0] if sides and sides[0] > 0 else None


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: an integer, or the bytes of a text or inner message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(kind)
        if at + length > len(message):
            raise ValueError(length)
        yield tag >> 3, message[at:at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(shift)
