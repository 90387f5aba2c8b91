"""How many scans a JPEG has, counted before it is decoded.

Every scan walks over all blocks of the picture, though it may hold a few bytes only: 1.4 MB have room
for 20,000, which take minutes. An encoder's progressive JPEG has about ten.
"""

import re

# A marker ends the data of a scan; FF 00 is data, FF D0 to FF D7 restart within it.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA


def count_scans(jpeg: bytes, most: int) -> int:
    """Return the number of scans; of more than `most` only that there are, `most + 1`."""
    if jpeg.count(b"\xff\xda") <= most:  # can only be too many: other segments may hold these bytes
        return jpeg.count(b"\xff\xda")
    scans, at = 0, 0
    while scans <= most and (found := _MARKER.search(jpeg, at)):
        marker, at = found[1][0], found.end()
        if marker == _EOI:  # what follows is not the picture's: a second one, a video
            break
        scans += marker == _SOS
        if marker not in (_SOI, _TEM):
            at += max(
                int.from_bytes(jpeg[at : at + 2], "big"), 2
            )  # the segment, its length included
    return scans
