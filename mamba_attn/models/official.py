"""Downloads the published weights of Vim and VMamba."""

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mamba_attn.errors import WeightsError, nearest

_VIM = "https://huggingface.co/hustvl/Vim-{}-midclstok/resolve/main"
_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download/%23{}cls"
_CHUNK = 1 << 20
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Published:
    """One published file.

    Args:
        folder: URL of the folder it is in.
        file: its name.
        size: in bytes, where known.
        sha256: of its content, in hexadecimal, where known.
    """

    folder: str
    file: str
    size: int | None = None
    sha256: str | None = None


PUBLISHED: dict[str, Published] = {
    "vim_tiny": Published(_VIM.format("tiny"), "vim_t_midclstok_76p1acc.pth"),
    "vim_tiny_stride8": Published(_VIM.format("tiny"), "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_small": Published(_VIM.format("small"), "vim_s_midclstok_80p5acc.pth"),
    "vim_small_stride8": Published(_VIM.format("small"), "vim_s_midclstok_ft_81p6acc.pth"),
    "vim_base": Published(_VIM.format("base"), "vim_b_midclstok_81p9acc.pth"),
    "vanilla_vmamba_tiny": Published(_VMAMBA.format("v0"), "vssmtiny_dp01_ckpt_epoch_292.pth"),
    "vanilla_vmamba_small": Published(_VMAMBA.format("v0"), "vssmsmall_dp03_ckpt_epoch_238.pth"),
    "vanilla_vmamba_base": Published(_VMAMBA.format("v0"), "vssmbase_dp06_ckpt_epoch_241.pth"),
    "vmamba_tiny_s2l5": Published(_VMAMBA.format("v2"), "vssm_tiny_0230_ckpt_epoch_262.pth"),
    "vmamba_small_s2l15": Published(_VMAMBA.format("v2"), "vssm_small_0229_ckpt_epoch_222.pth"),
    "vmamba_base_s2l15": Published(_VMAMBA.format("v2"), "vssm_base_0229_ckpt_epoch_237.pth"),
    "vmamba_tiny_s1l8": Published(_VMAMBA.format("v2"), "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    "vmamba_small_s1l20": Published(_VMAMBA.format("v2"), "vssm1_small_0229s_ckpt_epoch_240.pth"),
    "vmamba_base_s1l20": Published(_VMAMBA.format("v2"), "vssm1_base_0229s_ckpt_epoch_225.pth"),
}


def cache_folder() -> Path:
    """Return the folder for downloads: ``MAMBA_ATTN_CACHE``, or ~/.cache/mamba_attn."""
    return Path(os.environ.get("MAMBA_ATTN_CACHE") or Path.home() / ".cache" / "mamba_attn")


def fetch(name: str, base_url: str | None = None) -> Path:
    """Return the file of published weights, downloaded once.

    Size and hash are checked where they are known, and the size against what the server announces. A file appears in
    the cache only when it is complete.

    Args:
        name: a model's name, one of ``PUBLISHED``.
        base_url: a folder to take the file from instead, e.g. a mirror.

    Raises:
        WeightsError: no published weights of that name, no connection, no such file there, or not the file expected.
    """
    if name not in PUBLISHED:
        raise WeightsError(
            f"fetch({name!r}): there are no published weights for this model. {nearest(name, PUBLISHED)}"
        )
    published = PUBLISHED[name]
    path = cache_folder() / published.file
    if path.is_file() and (published.size is None or path.stat().st_size == published.size):
        return path
    url = f"{(base_url or published.folder).rstrip('/')}/{published.file}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=published.file, delete=False) as part:
        try:
            _download(name, url, published, part)
            part.close()
            os.replace(part.name, path)
        finally:
            Path(part.name).unlink(missing_ok=True)
    return path


def _download(name: str, url: str, published: Published, part: IO[bytes]) -> None:
    """Download a URL to an open file, and check its size and hash."""
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            announced = response.headers.get("Content-Length")
            while chunk := response.read(_CHUNK):
                part.write(chunk)
                digest.update(chunk)
                received += len(chunk)
    except urllib.error.HTTPError as error:
        error.close()
        raise WeightsError(
            f"fetch({name!r}): {url} answered {error.code} {error.reason}. {_by_hand(published)}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise WeightsError(f"fetch({name!r}): {url} could not be fetched ({reason}). {_by_hand(published)}") from error
    size = published.size if published.size is not None else int(announced) if announced else received
    if received != size:
        raise WeightsError(f"fetch({name!r}): {url} sent {received:,} of {size:,} bytes; nothing was kept, try again.")
    if published.sha256 is not None and digest.hexdigest() != published.sha256:
        raise WeightsError(
            f"fetch({name!r}): {url} has the SHA-256 {digest.hexdigest()}, expected {published.sha256}; nothing was "
            "kept. This is not the published file."
        )


def _by_hand(published: Published) -> str:
    return f"Where there is a network, download {published.file} and give its path as weights=."
