"""Keyed replacements that keep a value's shape: the arithmetic behind `snapshot --anonymize`.

One key gives one value the same stand-in wherever it turns up, and two different addresses never
the same one; without the key the stand-ins tell nothing.
"""

from __future__ import annotations

import hmac
import re
from hashlib import sha256
from ipaddress import AddressValueError, IPv6Address

UUID = re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")
# PXE writes `BOOTIF=01-` and the address with dashes.
_MAC = re.compile(
    r"(?<![0-9a-fA-F:-])(01-)?([0-9a-fA-F]{2}([:-])(?:[0-9a-fA-F]{2}\3){4}[0-9a-fA-F]{2})"
    r"(?![0-9a-fA-F:-])"
)
_BARE_MAC = re.compile(r"\b(enx|wlx|wwx|ibx)([0-9a-f]{12})\b")
_IPV4 = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9]|\.[0-9])")
_IPV6 = re.compile(r"(?<![0-9a-zA-Z:.])[0-9a-fA-F:]*:[0-9a-fA-F:]*:[0-9a-fA-F:]*(?![0-9a-zA-Z:])")
_LVM_OR_LUKS = re.compile(r"\b(LVM-|CRYPT-[A-Z0-9]+-)([0-9A-Za-z]{32,64})")


class Mask:
    """Replacements under one key (32 random bytes)."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def digest(self, kind: str, value: bytes, size: int) -> bytes:
        """`size` bytes that stand for `value`."""
        found = b""
        block = 0
        while len(found) < size:
            label = f"{kind}:{block}:".encode()
            found += hmac.new(self._key, label + value, sha256).digest()
            block += 1
        return found[:size]

    def _permuted(self, kind: str, value: int, bits: int) -> int:
        """A keyed permutation of the numbers of 8 or 16 bits: four Feistel rounds."""
        half = bits // 2
        limit = (1 << half) - 1
        left, right = value >> half, value & limit
        for turn in range(4):
            word = self.digest(f"{kind}:{turn}", right.to_bytes(1, "big"), 2)
            left, right = right, left ^ int.from_bytes(word, "big") & limit
        return left << half | right

    def _step(self, kind: str, value: int, bits: int) -> int:
        """As `_permuted`, but all zeros and all ones stay: they are no one's address."""
        ends = (0, (1 << bits) - 1)
        if value in ends:
            return value
        value = self._permuted(kind, value, bits)
        while value in ends:
            value = self._permuted(kind, value, bits)
        return value

    def shape(self, text: str) -> str:
        """Another text of the same length: digits for digits, letters for letters, rest kept."""
        stream = self.digest("text", text.lower().encode("utf-8", "surrogateescape"), len(text))
        is_hex = all(char in "0123456789abcdefABCDEF" or not char.isalnum() for char in text)
        letters = "abcdef" if is_hex else "abcdefghijklmnopqrstuvwxyz"
        found = []
        for char, byte in zip(text, stream, strict=True):
            if char.isdigit():
                char = str(byte % 10)
            elif char.isalpha():
                other = letters[byte % len(letters)]
                char = other.upper() if char.isupper() else other
            found.append(char)
        return "".join(found)

    def uuid(self, text: str) -> str:
        """A version 4 UUID for a UUID, in the same case."""
        raw = bytearray(self.digest("uuid", bytes.fromhex(text.replace("-", "")), 16))
        raw[6] = raw[6] & 0x0F | 0x40
        raw[8] = raw[8] & 0x3F | 0x80
        word = raw.hex()
        found = "-".join((word[:8], word[8:12], word[12:16], word[16:20], word[20:]))
        return found.upper() if text != text.lower() else found

    def mac_bytes(self, mac: bytes) -> bytes:
        """A locally administered address for a MAC; none, broadcast and multicast are kept."""
        if not any(mac) or mac[0] & 1:
            return mac
        raw = self.digest("mac", mac, 6)
        return bytes([raw[0] & 0xFC | 0x02]) + raw[1:]

    def mac(self, text: str) -> str:
        sign = text[2] if len(text) == 17 else ""
        found = self.mac_bytes(bytes.fromhex(text.replace(sign, "") if sign else text))
        return found.hex(sign) if sign else found.hex()

    def ipv4(self, octets: bytes) -> bytes:
        """Prefix by prefix, so that one network stays one network; loopback and masks are kept."""
        if octets[0] in (0, 127, 255):
            return octets
        found = [self._step("v4:", octets[0], 8)]
        while found[0] in (0, 127, 255):
            found[0] = self._step("v4:", found[0], 8)
        for index in (1, 2, 3):
            found.append(self._step(f"v4:{octets[:index].hex()}", octets[index], 8))
        return bytes(found)

    def ipv6(self, packed: bytes) -> bytes:
        """As `ipv4`, in groups of 16 bits; loopback, link-local and multicast prefixes are kept."""
        if packed[:15] == bytes(15):
            return packed
        if packed[:2] == b"\xfe\x80" and packed[2:12] == bytes(10):
            return packed  # fe80::1 names nobody, and counts as given by hand (usage/network.py).
        found = b""
        for index in range(0, 16, 2):
            group = int.from_bytes(packed[index : index + 2], "big")
            known = index == 0 and (_is_link_local(group) or group >> 8 == 0xFF)
            other = group if known else self._step(f"v6:{packed[:index].hex()}", group, 16)
            # An address that was global stays one: it must not become what is kept.
            while index == 0 and not known and (_is_link_local(other) or other >> 8 == 0xFF):
                other = self._step("v6:", other, 16)
            found += other.to_bytes(2, "big")
        return found

    def text(self, text: str) -> str:
        """All UUIDs, MACs and IP addresses in a text replaced."""
        text = UUID.sub(lambda match: self.uuid(match[0]), text)
        text = _MAC.sub(lambda match: (match[1] or "") + self.mac(match[2]), text)
        text = _BARE_MAC.sub(lambda match: match[1] + self.mac(match[2]), text)
        text = _LVM_OR_LUKS.sub(lambda match: match[1] + self.shape(match[2]), text)
        text = _IPV6.sub(lambda match: self._ipv6_text(match[0]), text)
        return _IPV4.sub(lambda match: self._ipv4_text(match[0]), text)

    def _ipv4_text(self, text: str) -> str:
        octets = [int(word) for word in text.split(".")]
        if max(octets) > 255:
            return text
        return ".".join(str(octet) for octet in self.ipv4(bytes(octets)))

    def _ipv6_text(self, text: str) -> str:
        try:
            packed = IPv6Address(text).packed
        except AddressValueError:
            return text
        return str(IPv6Address(self.ipv6(packed)))


def _is_link_local(group: int) -> bool:
    """Whether an address's first 16 bits are those of fe80::/10 (RFC 4291, 2.5.6)."""
    return group >> 6 == 0xFE80 >> 6
