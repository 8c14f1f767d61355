"""Norms, biases and other small tensors: read once, in memory for good."""

from __future__ import annotations

from contextlib import closing

from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile, TensorInfo
from runtime.memory import Region, view
from runtime.sizes import PAGE, page_down, page_up
from runtime.weights.files import WeightFiles


class SmallTensors:
    """Norms, biases and tables outside the layers: read once, always there."""

    def __init__(self, file: ModelFile, files: WeightFiles) -> None:
        """Read them. Raises DiskError."""
        self._offsets: dict[str, int] = {}
        end = 0
        for info in file.small_tensors:
            self._offsets[info.name] = end
            end += -(-info.n_bytes // 64) * 64
        self._region = Region(end or PAGE)
        try:
            self._region.use_huge_pages(0)
            self._read(sorted(file.small_tensors, key=lambda info: (info.file, info.offset)), files)
        except BaseException:
            self._region.free()
            raise

    def place(self, model: HollowModel) -> None:
        """Point the model's tensors at them."""
        for name, offset in self._offsets.items():
            for address in model.weights.get(name, ()):
                abi.Tensor.from_address(address).data = self._region.address + offset

    def _read(self, tensors: list[TensorInfo], files: WeightFiles) -> None:
        """Through a bounce buffer, neighbours in the file together."""
        with closing(Region(2 * 2**20)) as bounce:
            self._read_through(bounce, tensors, files)

    def _read_through(self, bounce: Region, tensors: list[TensorInfo], files: WeightFiles) -> None:
        have = (-1, 0, 0)  # file and range now in the bounce buffer
        for info in tensors:
            offset = self._offsets[info.name]
            done = 0
            while done < info.n_bytes:
                place = info.offset + done
                if info.file != have[0] or not have[1] <= place < have[2]:
                    start = page_down(place)
                    n_bytes = min(bounce.n_bytes, page_up(info.offset + info.n_bytes) - start)
                    files.read(info.file, start, bounce.address, n_bytes)
                    have = (info.file, start, start + n_bytes)
                part = min(info.n_bytes - done, have[2] - place)
                target = view(self._region.address + offset + done, part)
                target[:] = view(bounce.address + place - have[1], part)
                done += part

    def free(self) -> None:
        """Unmap; the model must not compute afterwards."""
        self._region.free()
