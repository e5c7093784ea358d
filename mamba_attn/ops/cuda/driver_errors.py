"""What the CUDA driver's error codes mean for a user: the sentence, the remedy, and the kind of error."""

import torch

from mamba_attn.errors import BackendUnavailableError, MambaAttnError

# the driver refuses the code itself; code in another form may still run
_REJECTED = {200, 209, 218, 222, 223}
# after these every CUDA call of the process fails
_STICKY = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721}
NOT_FOUND = 500
_OUT_OF_MEMORY = 2

_UPDATE = "Update the NVIDIA driver, or install a torch built for an older CUDA."
_REMEDIES = {
    1: "Launch it with fewer blocks or less shared memory (a smaller batch), or use backend='blocked'.",
    3: "CUDA cannot be used after a fork: start worker processes with the 'spawn' method.",
    34: "This libcuda is the stub of the CUDA toolkit; put the driver's own folder first in LD_LIBRARY_PATH.",
    36: _UPDATE,
    46: "Another process holds the GPU for itself; use a free one.",
    100: "Check with nvidia-smi that there is a GPU, and that CUDA_VISIBLE_DEVICES names it.",
    101: "Check CUDA_VISIBLE_DEVICES.",
    201: "Run any torch operation on the device first.",
    221: "The driver's PTX compiler (libnvidia-ptxjitcompiler) is missing; install the whole driver.",
    701: "The block needs more registers or shared memory than there are; use backend='blocked'.",
    802: "The system is not ready for CUDA yet (the fabric manager is not running?).",
    803: "The loaded driver module and the driver's libraries differ; restart the machine.",
    804: "The compatibility libraries of CUDA do not support this GPU; take them off LD_LIBRARY_PATH.",
    900: "Run the call once before capturing the graph.",
    901: "Run the call once before capturing the graph.",
}


class ImageRejectedError(BackendUnavailableError):
    """The driver cannot load this machine code or PTX; in another form it may."""


def error_of(code: int, name: str, text: str, doing: str) -> RuntimeError:
    """Return what to raise for an error code of the driver.

    Args:
        code: what the driver returned, not zero.
        name: its name there, "CUDA_ERROR_NO_DEVICE".
        text: the driver's words for it.
        doing: what was asked of the driver, "load the kernels on cuda:0".
    """
    said = f"the CUDA driver could not {doing}: {text} ({name}, {code})."
    if code == _OUT_OF_MEMORY:
        return torch.cuda.OutOfMemoryError(
            f"CUDA out of memory: {said} Use a smaller batch, or torch.cuda.empty_cache() if torch holds what is free."
        )
    if code in _STICKY:
        return MambaAttnError(
            f"{said} The CUDA context of this process is lost; restart the process. The fault may be an earlier "
            "kernel's: CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer shows whose."
        )
    if code == NOT_FOUND:
        return MambaAttnError(f"{said} The compiled sources hold no kernel of that name; reinstall mamba_attn.")
    if code in _REJECTED:
        return ImageRejectedError(f"{said} {_UPDATE}")
    return BackendUnavailableError(f"{said} {_REMEDIES.get(code, 'Check the driver with nvidia-smi.')}")
