"""Norms, biases and other small tensors: read once, in memory for good."""

from __future__ import annotations

from runtime import llama_abi as abi
from runtime.aligned_io import WeightFiles
from runtime.hollow import HollowModel
from runtime.memory import Region, view
from runtime.model_file import ModelFile, TensorInfo
from runtime.sizes import PAGE, page_down, page_up


class SmallTensors:
    """Norms, biases and tables outside the layers: read once, always there."""

    def __init__(self, file: ModelFile, model: HollowModel, files: WeightFiles) -> None:
        tensors = [t for t in file.small_tensors if t.name in model.weights]
        offsets, end = [], 0
        for info in tensors:
            offsets.append(end)
            end += -(-info.n_bytes // 64) * 64
        self._region = Region(end or PAGE)
        self._region.use_huge_pages(0)
        self._read(tensors, offsets, files)
        for info, offset in zip(tensors, offsets, strict=True):
            for address in model.weights[info.name]:
                abi.Tensor.from_address(address).data = self._region.address + offset

    def _read(self, tensors: list[TensorInfo], offsets: list[int], files: WeightFiles) -> None:
        """Through a bounce buffer, neighbours in the file together."""
        bounce = Region(2 * 2**20)
        have = (-1, 0, 0)  # file and range now in the bounce buffer
        for info, offset in sorted(zip(tensors, offsets, strict=True), key=lambda t: (t[0].file, t[0].offset)):
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
        bounce.free()

    def free(self) -> None:
        """Unmap; the model must not compute afterwards."""
        self._region.free()
