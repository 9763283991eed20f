"""The streams of docs/spec.md §4, version 2: range coder and models in Python's unbounded integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

MANTISSA = {16: 10, 32: 23}


class Node:
    """The probability of a one, in units of 2⁻²²."""

    def __init__(self) -> None:
        self.p, self.uses = 1 << 21, 0

    def probability(self) -> int:
        return (self.p >> 6) | 1

    def update(self, bit: int) -> None:
        rate = (1 << 17) // (2 * self.uses + 3)
        self.p += (bit * (2**22 - 1) - self.p) * rate >> 16
        self.uses = min(self.uses + 1, 1023)


class Encoder:
    """One number that grows: `low` has 64 bits and 32 more for every shift."""

    def __init__(self) -> None:
        self.low, self.range, self.size = 0, 2**64 - 1, 64
        self.bits: list[int] = []

    def bit(self, node: Node, bit: int) -> int:
        bound = (self.range >> 16) * node.probability()
        self.low, self.range = (self.low, bound) if bit else (self.low + bound, self.range - bound)
        if self.range < 2**32:
            self.low, self.range, self.size = self.low << 32, self.range << 32, self.size + 32
        node.update(bit)
        return bit

    def plain(self, count: int, value: int) -> int:
        self.bits += [value >> i & 1 for i in range(count)]
        return value

    def finish(self) -> bytes:
        for left in range(56, -1, -8):
            number = -(-self.low >> left)
            if (number + 1) << left <= self.low + self.range:
                break
        packed = sum(bit << i for i, bit in enumerate(self.bits))
        return number.to_bytes((self.size - left) // 8, "big") + packed.to_bytes(-(-len(self.bits) // 8), "big")


class Decoder:
    """Reads the stream's number from the front and plain bits from the back; zeros follow both ends."""

    def __init__(self, stream: bytes) -> None:
        self.stream, self.next, self.taken, self.range = stream, 8, 0, 2**64 - 1
        self.offset = int.from_bytes(stream[:8].ljust(8, b"\0"), "big")

    def bit(self, node: Node, _: int) -> int:
        bound = (self.range >> 16) * node.probability()
        bit = int(self.offset < bound)
        self.offset, self.range = (self.offset, bound) if bit else (self.offset - bound, self.range - bound)
        if self.range < 2**32:
            word = self.stream[self.next : self.next + 4].ljust(4, b"\0")
            self.offset, self.range = (self.offset << 32) + int.from_bytes(word, "big"), self.range << 32
            self.next += 4
        node.update(bit)
        return bit

    def plain(self, count: int, _: int) -> int:
        value = 0
        for i in range(count):
            byte, place = divmod(self.taken, 8)
            if byte < len(self.stream):
                value |= (self.stream[-1 - byte] >> place & 1) << i
            self.taken += 1
        return value


Coder = Encoder | Decoder


def toward_zero(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def number(coder: Coder, nodes: defaultdict[tuple[int, ...], Node], context: int, bits: int, value: int) -> int:
    path = 1
    for i in range(bits - 1, -1, -1):
        path = 2 * path + coder.bit(nodes[context, path], value >> i & 1)
    return path - (1 << bits)


def floats(coder: Coder, values: list[int], rows: int, columns: int, width: int) -> None:
    """Codes rows·columns bit patterns of `width` bits; a decoder replaces the values."""
    mantissa = MANTISSA[width]
    exponent = width - 1 - mantissa
    exponents: defaultdict[tuple[int, ...], Node] = defaultdict(Node)
    mantissas: defaultdict[tuple[int, ...], Node] = defaultdict(Node)
    sign = Node()
    means = [0] * min(columns, 65_536)
    for r in range(rows):
        deviation = 0
        for j in range(columns):
            at, c = r * columns + j, j % 65_536
            value = values[at]
            level = clamp((means[c] + toward_zero(deviation, j + 16)) >> 7, 0, (2 << exponent) - 1)
            e = number(coder, exponents, level, exponent, value >> mantissa & (1 << exponent) - 1)
            upper = number(coder, mantissas, e, 4, value >> mantissa - 4 & 15)
            rest = coder.plain(mantissa - 4, value & (1 << mantissa - 4) - 1)
            negative = coder.bit(sign, value >> width - 1)
            magnitude = e << mantissa | upper << mantissa - 4 | rest
            values[at] = negative << width - 1 | magnitude
            log = magnitude >> mantissa - 8
            deviation += log - means[c]
            means[c] += toward_zero(log - means[c], min(r + 1, 64))


def integers(coder: Coder, values: list[int], rows: int, columns: int) -> None:
    """Codes rows·columns integers of -128 … 127; a decoder replaces the values."""
    bits = min(coder.plain(4, max((abs(v) for v in values), default=0).bit_length()), 8)
    if bits == 0:
        values[:] = [0] * len(values)
        return
    nodes: defaultdict[tuple[int, ...], Node] = defaultdict(Node)
    factors = [4096] * min(columns, 65_536)
    typical = 64 << bits
    for r in range(rows):
        mean, total, weight = typical, 0, 0
        for j in range(columns):
            at, factor = r * columns + j, factors[j % 65_536]
            expected = max(mean * factor >> 12, 4)
            octave = expected.bit_length() - 1
            level = 4 * octave + (expected >> octave - 2 & 3)
            magnitude = number(coder, nodes, level, bits, abs(values[at]))
            negative = magnitude and coder.plain(1, int(values[at] < 0))
            values[at] = ((-magnitude if negative else magnitude) + 128) % 256 - 128
            total += magnitude
            weight += factor
            if j % 16 == 15:
                mean = clamp(((16 * typical << 12) + (total << 20)) // ((16 << 12) + weight), 1, 32_768)
        if total == 0:
            continue
        mean = clamp((total << 20) // weight, 1, 32_768)
        rate = min(r + 2, 256)
        typical += toward_zero(mean - typical, rate)
        unit = (1 << 32) // mean
        for j in range(columns):
            c = j % 65_536
            found = abs(values[r * columns + j]) * unit >> 12
            factors[c] = clamp(factors[c] + toward_zero(found - factors[c], rate), 64, 262_144)


def encode_floats(values: Sequence[int], rows: int, columns: int, width: int) -> bytes:
    coder = Encoder()
    floats(coder, list(values), rows, columns, width)
    return coder.finish()


def decode_floats(stream: bytes, rows: int, columns: int, width: int) -> list[int]:
    values = [0] * (rows * columns)
    floats(Decoder(stream), values, rows, columns, width)
    return values


def encode_integers(values: Sequence[int], scales: Sequence[int], rows: int, columns: int) -> bytes:
    coder = Encoder()
    floats(coder, list(scales), rows, 1, 16)
    integers(coder, list(values), rows, columns)
    return coder.finish()


def decode_integers(stream: bytes, rows: int, columns: int) -> tuple[list[int], list[int]]:
    coder = Decoder(stream)
    scales, values = [0] * rows, [0] * (rows * columns)
    floats(coder, scales, rows, 1, 16)
    integers(coder, values, rows, columns)
    return values, scales
