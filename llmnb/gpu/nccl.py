# Written by `make export` from notebooks/6_machines/05_gpus.py: edit that file.

"""NCCL, which moves arrays from GPU to GPU, by ctypes."""

__all__ = ["Communicator", "FLOAT", "nccl_version", "new_key"]


# imports of NCCL
import ctypes
import functools
from contextlib import contextmanager

import numpy as np

from llmnb.gpu.launch import address, check_device, stream_address


# the library
FLOAT = 7  # ncclFloat32
_PLACE, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t


class _Key(ctypes.Structure):
    """What tells one group from another; passed as it is."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


_CALLS = {
    "ncclGetVersion": [ctypes.POINTER(_INT)],
    "ncclGetUniqueId": [ctypes.POINTER(_Key)],
    "ncclCommInitRank": [ctypes.POINTER(_PLACE), _INT, _Key, _INT],
    "ncclCommGetAsyncError": [_PLACE, ctypes.POINTER(_INT)],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    "ncclSend": [_PLACE, _SIZE, _INT, _INT, _PLACE, _PLACE],
    "ncclRecv": [_PLACE, _SIZE, _INT, _INT, _PLACE, _PLACE],
    "ncclBroadcast": [_PLACE, _PLACE, _SIZE, _INT, _INT, _PLACE, _PLACE],
}


@functools.cache
def _library():
    """libnccl with the types of its functions; of the system, or of pip."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        try:
            from cuda import pathfinder

            found = pathfinder.load_nvidia_dynamic_lib("nccl")
            library = ctypes.CDLL(found.abs_path)
        except Exception as error:  # each way of not being there has its own
            raise ImportError(
                "a group of GPUs needs NCCL, libnccl.so.2: pip install "
                "'llmnb[nccl]', or take --group mpi, which sends through "
                "the hosts"
            ) from error
    for name, types in _CALLS.items():
        getattr(library, name).argtypes = types
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _asked(name, *args):
    """Call a function of the library; RuntimeError when it refuses."""
    code = getattr(_library(), name)(*args)
    if code:
        said = _library().ncclGetErrorString(code).decode()
        raise RuntimeError(f"NCCL: {name}: {said} ({code})")


# a communicator
def nccl_version():
    """The version of NCCL as a number, 23203 for 2.32.3.

    Raises ImportError, which says what to install, where there is none.

    Derived in chapter 6.5.
    """
    number = _INT()
    _asked("ncclGetVersion", ctypes.byref(number))
    return number.value


def new_key():
    """A key of a new group, as text; all its ranks must have the same.

    Derived in chapter 6.5.
    """
    key = _Key()
    _asked("ncclGetUniqueId", ctypes.byref(key))
    return bytes(key.bytes).hex()


class Communicator:
    """A rank's place in a group of GPUs; its calls do not wait.

    rank, size, key: which of how many, and the group's `new_key`. All ranks
    make one at a time, each with its own GPU current, and that waits. Arrays
    are a device's, flat, float32; what is called goes to the current stream.
    Raises RuntimeError when NCCL refuses.

    Derived in chapter 6.5.
    """

    def __init__(self, rank, size, key):
        self._place, made = _PLACE(), _Key()
        made.bytes[:] = bytes.fromhex(key)
        place = ctypes.byref(self._place)
        _asked("ncclCommInitRank", place, size, made, rank)

    @contextmanager
    def together(self):
        """What is called within happens at once, when it is left."""
        _asked("ncclGroupStart")
        try:
            yield
        except BaseException:
            _library().ncclGroupEnd()  # the first error is the one to tell
            raise
        _asked("ncclGroupEnd")

    def send(self, array, rank):
        """Send an array to a rank, which receives one as long."""
        _asked("ncclSend", *_numbers(array), FLOAT, rank, *self._where())

    def recv(self, array, rank):
        """Overwrite an array with what a rank sends."""
        _asked("ncclRecv", *_numbers(array), FLOAT, rank, *self._where())

    def broadcast(self, array, root):
        """Overwrite an array with the root's, everywhere."""
        place, size = _numbers(array)
        how = place, place, size, FLOAT, root
        _asked("ncclBroadcast", *how, *self._where())

    def _where(self):
        return self._place, stream_address()

    def check(self):
        """Raise RuntimeError if something failed since it was called."""
        code = _INT()
        _asked("ncclCommGetAsyncError", self._place, ctypes.byref(code))
        if code.value:
            said = _library().ncclGetErrorString(code.value).decode()
            raise RuntimeError(f"NCCL: a call failed later: {said}")


def _numbers(array):
    """Where an array lies, and how many numbers it has."""
    check_device("NCCL: array", array, kinds=np.float32)
    return address(array), array.size
