"""Sets of images that were made to harm: pictures, idx files, tar archives, NumPy's archives, and what unpacks to much."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

HUGE = 2**32 - 1


def cases(world):
    """Each set is given as samples, as a reference and as data."""
    for name, (ending, content) in sets(world).items():
        for flag in ["train --data", "evaluate --samples", "evaluate --reference"]:
            def check(ending=ending, content=content, flag=flag):
                path = world.folder_for("set") / f"x{ending}"
                if callable(content):
                    content(path)
                else:
                    path.write_bytes(content)
                evaluate = ["evaluate", "--features", "fashion-mnist-judge"]
                arguments = {
                    "train --data": ["train", "--config", world.folder / "network.json", "--out", path.parent / "new", "--data", path],
                    "evaluate --samples": [*evaluate, "--samples", path, "--reference", world.samples],
                    "evaluate --reference": [*evaluate, "--samples", world.samples, "--reference", path],
                }[flag]
                world.run(*arguments).refused([f"x{ending}", "x/"])
            yield f"{flag} {name}", check


def sets(world):
    good = world.data.read_bytes()
    picture = png(8, 8)
    return {
        # idx
        "idx: empty": ("", b""),
        "idx: three bytes": ("", good[:3]),
        "idx: cut": ("", good[:-1]),
        "idx: bytes after": ("", good + b"x"),
        "idx: no images": ("", struct.pack(">IIII", 0x803, 0, 8, 8)),
        "idx: images of nothing": ("", struct.pack(">IIII", 0x803, 1 << 31, 0, 0)),
        "idx: 2^96 bytes": ("", struct.pack(">IIII", 0x803, HUGE, HUGE, HUGE)),
        "idx: 2^32 images": ("", struct.pack(">IIII", 0x803, HUGE, 8, 8)),
        "idx: 255 dimensions": ("", struct.pack(">I", 0x8FF) + b"\1" * 2000),
        "idx: numbers of f64": ("", struct.pack(">IIII", 0xE03, 1, 8, 8) + bytes(512)),
        "idx: a sparse file of 90 GB": ("", sparse(struct.pack(">IIII", 0x803, HUGE, 28, 28), 90 << 30)),
        "idx: a gzip bomb": (".gz", gzip_bomb(struct.pack(">IIII", 0x803, 1 << 20, 64, 64), 4 << 30)),
        "idx: gzip, cut": (".gz", gzip.compress(good)[:-9]),
        "idx: gzip of gzip": (".gz", gzip.compress(gzip.compress(good))),
        "idx: gzip, sums wrong": (".gz", gzip.compress(good)[:-8] + b"\0" * 8),
        "idx: a label of 2^32 - 1": ("-images-idx3-ubyte", labelled(0xC01, struct.pack(">II", 0xC01, 1) + b"\xff" * 4)),
        # tar
        "tar: empty": (".tar", b""),
        "tar: no pictures": (".tar", tar([("a.txt", b"x")])),
        "tar: random bytes": (".tar", bytes(range(256)) * 64),
        "tar: cut": (".tar", tar([("a/x.png", picture)])[:600]),
        "tar: a size of 8 GB": (".tar", tar_of_size(8 << 30)),
        "tar: a name of 1 GB": (".tar", tar_of_size(1 << 30, b"L")),
        "tar: a sparse file of 90 GB": (".tar", sparse(tar_of_size(90 << 30), 90 << 30)),
        "tar: a gzip bomb": (".tar.gz", gzip_bomb(tar_of_size(4 << 30), 4 << 30)),
        "tar: gzip that is none": (".tar.gz", b"\x1f\x8b" + bytes(64)),
        "tar: bzip2": (".tar.bz2", b"BZh91AY&SY" + bytes(64)),
        "tar: a link": (".tar", tar_link()),
        "tar: zstd bomb": (".tar.zst", b"\x28\xb5\x2f\xfd\xc0" + struct.pack("<Q", 1 << 50) + b"\xff" * 64),
        # pictures
        "pictures: a picture of 60000×60000": (".tar", tar([("a/x.png", png(60_000, 60_000, b""))])),
        "pictures: 2^31 wide": (".tar", tar([("a/x.png", png(2**31 - 1, 1, b""))])),
        "pictures: a PNG bomb": (".tar", lambda path: path.write_bytes(tar([("a/x.png", png_bomb(30_000))]))),
        "pictures: cut": (".tar", tar([("a/x.png", picture[:-20])])),
        "pictures: empty": (".tar", tar([("a/x.png", b"")])),
        "pictures: GIF as PNG": (".tar", tar([("a/x.png", b"GIF89a" + bytes(64))])),
        "pictures: two sizes": (".tar", tar([("a/x.png", picture), ("a/y.png", png(16, 16))])),
        # npz
        "npz: empty": (".npz", b""),
        "npz: no archive": (".npz", b"x" * 4096),
        "npz: nothing in it": (".npz", npz({})),
        "npz: other names": (".npz", npz({"images": npy((2, 8, 8, 1), "|u1", bytes(128))})),
        "npz: cut": (".npz", npz({"arr_0": npy((2, 8, 8, 1), "|u1", bytes(128))})[:-30]),
        "npz: 2^63 images": (".npz", npz({"arr_0": npy((2**63, 8, 8, 1), "|u1", bytes(128))})),
        "npz: a shape that overflows": (".npz", npz({"arr_0": npy((2**40, 2**40, 8, 1), "|u1", b"")})),
        "npz: a negative shape": (".npz", npz({"arr_0": npy((-2, 8, 8, 1), "|u1", bytes(128))})),
        "npz: objects": (".npz", npz({"arr_0": npy((2,), "|O", b"\x80\x04cos\nsystem\n.")})),
        "npz: no header": (".npz", npz({"arr_0": b"\x93NUMPY\x01\x00\xff\xff"})),
        "npz: a header of 4 GB": (".npz", npz({"arr_0": b"\x93NUMPY\x02\x00" + struct.pack("<I", HUGE)})),
        "npz: a header of brackets": (".npz", npz({"arr_0": npy_header(b"{" * 60_000)})),
        "npz: a bomb": (".npz", npz_bomb(3 << 29)),
        "npz: a size that lies": (".npz", lying_size(npz({"arr_0": npy((2, 8, 8, 1), "|u1", bytes(128))}))),
        "npz: sigma not square": (".npz", statistics((128,), (128, 64))),
        "npz: sigma of NaN": (".npz", statistics((128,), (128, 128), struct.pack("<d", float("nan")))),
        "npz: sigma's upper half": (".npz", statistics((128,), (128, 128), None)),
        "npz: 10^6 features": (".npz", statistics((10**6,), (10**6, 10**6), b"")),
        "npz: 65,000 members": (".npz", lambda path: path.write_bytes(npz({f"a{index}": b"" for index in range(65_000)}))),
    }


def sparse(head, size):
    def write(path):
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(size)
    return write


def labelled(_kind, labels):
    def write(path):
        path.write_bytes(struct.pack(">IIII", 0x803, 1, 8, 8) + bytes(64))
        path.with_name(path.name.replace("images-idx3", "labels-idx1")).write_bytes(labels)
    return write


def gzip_bomb(head, size):
    """Zeros after a head: a thousandth of their size. Made when it is used."""
    def write(path):
        squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
        block = bytes(1 << 20)
        with open(path, "wb") as file:
            file.write(squeeze.compress(head))
            # A block that is flushed whole does not depend on the ones before it, so it is squeezed once.
            file.write(squeeze.flush(zlib.Z_FULL_FLUSH))
            same = squeeze.compress(block) + squeeze.flush(zlib.Z_FULL_FLUSH)
            for _ in range(size // len(block)):
                file.write(same)
    return write


def tar(members):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


def tar_of_size(size, kind=tarfile.REGTYPE):
    entry = tarfile.TarInfo("a/x.png")
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def tar_link():
    entry = tarfile.TarInfo("a/x.png")
    entry.type, entry.linkname = tarfile.LNKTYPE, "/etc/passwd"
    return entry.tobuf() + bytes(1024)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, data=None):
    """A gray picture; with `data` of its own it need not hold what its head says."""
    rows = zlib.compress(b"".join(b"\0" + bytes(width) for _ in range(height))) if data is None else data
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_bomb(size):
    squeeze = zlib.compressobj(1)
    rows = b"".join(squeeze.compress(bytes(size + 1)) for _ in range(size)) + squeeze.flush()
    return png(size, size, rows)


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy(shape, kind, data):
    shape = f"({', '.join(map(str, shape))},)"
    return npy_header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()) + data


def npz(members, how=zipfile.ZIP_STORED):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return whole.getvalue()


def npz_bomb(size):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                member.write(npy((size // 64, 8, 8, 1), "|u1", b""))
                block = bytes(16 << 20)
                for _ in range(size // len(block)):
                    member.write(block)
    return write


def lying_size(archive):
    """Both heads say that the member has 4 GB."""
    for at in range(len(archive) - 30):
        if archive[at : at + 4] == b"PK\x03\x04":
            archive = archive[: at + 18] + struct.pack("<II", HUGE - 1, HUGE - 1) + archive[at + 26 :]
        elif archive[at : at + 4] == b"PK\x01\x02":
            archive = archive[: at + 20] + struct.pack("<II", HUGE - 1, HUGE - 1) + archive[at + 28 :]
    return archive


def statistics(mu, sigma, value=struct.pack("<d", 1.0)):
    """mu and sigma; without a value, ones on the diagonal and above it, nothing below."""
    def numbers(shape):
        count = 1
        for side in shape:
            count *= side
        return value * count if value and len(value) else b""

    if value is None:
        side = sigma[0]
        rows = [[1.0 if column >= row else 0.0 for column in range(side)] for row in range(side)]
        filled = b"".join(struct.pack(f"<{side}d", *row) for row in rows)
        return npz({"mu": npy(mu, "<f8", bytes(8 * mu[0])), "sigma": npy(sigma, "<f8", filled)})
    return npz({"mu": npy(mu, "<f8", numbers(mu)), "sigma": npy(sigma, "<f8", numbers(sigma))})
