"""HighwayHash, the checksum that array_record files carry, of many byte strings of equal length at once."""

import numpy as np
from jaxtyping import UInt8, UInt64

_MUL0 = np.array([0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3], np.uint64)
_MUL1 = np.array([0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377], np.uint64)
_ZIPPER = np.array([3, 12, 2, 5, 14, 1, 15, 0, 11, 4, 10, 13, 9, 6, 8, 7])
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_PACKET = 32  # bytes


class _State:
    """Four lanes of 64 bits for each of n strings: [n, 4]."""

    def __init__(self, key: bytes, n: int):
        lanes = np.frombuffer(key, "<u8")
        self.mul0, self.mul1 = np.tile(_MUL0, (n, 1)), np.tile(_MUL1, (n, 1))
        self.v0, self.v1 = self.mul0 ^ lanes, self.mul1 ^ _swap_halves(lanes)

    def update(self, packet: np.ndarray) -> None:
        self.v1 += packet
        self.v1 += self.mul0
        self.mul0 ^= (self.v1 & _LOW) * (self.v0 >> _HALF)
        self.v0 += self.mul1
        self.mul1 ^= (self.v0 & _LOW) * (self.v1 >> _HALF)
        self.v0 += _zipper_merge(self.v1)
        self.v1 += _zipper_merge(self.v0)

    def update_rest(self, rest: np.ndarray) -> None:
        """The last packet, of 1 to 31 bytes per string."""
        n, size = rest.shape
        tail = size % 4
        self.v0 += np.uint64((size << 32) + size)
        halves = self.v1.view("<u4")
        halves[:] = (halves << np.uint32(size)) | (halves >> np.uint32(32 - size))
        packet = np.zeros((n, _PACKET), np.uint8)
        packet[:, : size - tail] = rest[:, : size - tail]
        if size >= 16:
            packet[:, 28:] = rest[:, -4:]
        elif tail:
            packet[:, 16:19] = rest[:, size - tail :][:, [0, tail // 2, tail - 1]]
        self.update(packet.view("<u8"))


def _swap_halves(lanes: np.ndarray) -> np.ndarray:
    return (lanes << _HALF) | (lanes >> _HALF)


def _zipper_merge(lanes: np.ndarray) -> np.ndarray:
    return np.take(lanes.view(np.uint8).reshape(-1, 16), _ZIPPER, axis=1).view("<u8").reshape(lanes.shape)


def highwayhash64(strings: UInt8[np.ndarray, "n size"], key: bytes) -> UInt64[np.ndarray, " n"]:
    """The 64-bit HighwayHash of each row.

    Args:
      key: 32 bytes.
    Source: Alakuijala, Cox and Wassenberg 2016 (arXiv 1612.06257); the portable implementation of github.com/google/highwayhash.
    """
    n, size = strings.shape
    whole = size - size % _PACKET
    state = _State(key, n)
    packets = np.ascontiguousarray(strings[:, :whole]).view("<u8").reshape(n, -1, 4)
    for packet in np.ascontiguousarray(packets.swapaxes(0, 1)):
        state.update(packet)
    if size > whole:
        state.update_rest(strings[:, whole:])
    for _ in range(4):
        state.update(_swap_halves(state.v0[:, [2, 3, 0, 1]]))
    return state.v0[:, 0] + state.v1[:, 0] + state.mul0[:, 0] + state.mul1[:, 0]
