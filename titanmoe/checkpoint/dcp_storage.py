"""Tensors in and out of a folder with torch.distributed.checkpoint (DCP), each rank its own shards, without pickle.

DCP describes its shards in `.metadata`, a pickle. That file is written, so that torch's own tools read our folders, and
never read here: `tensors.json` says the same. The shards themselves are read by torch.load(weights_only=True).
DCP's planners and storage classes are touched in this file only; checked against torch 2.13.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from titanmoe.checkpoint.files import HashingWriter, may_pass, write_whole
from titanmoe.checkpoint.manifest import FileRecord
from titanmoe.checkpoint.quantized_state import as_plain, is_quantized, requantize
from titanmoe.ops.sharding import local_box, local_tensor
from titanmoe.parallel.ranks import Ranks

TENSORS_NAME = "tensors.json"


@dataclass(frozen=True)
class Shard:
    """What this rank holds of a tensor: `local` begins at `offsets` in a tensor of `shape`. DCP takes it as it is.

    Unlike a DTensor it may lie on another device than its mesh, as a copy staged for a background save does. 8-bit
    optimizer states are stored as float32, so that other layouts and other optimizers can use them.
    """

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Shard:
        """This rank's part of a DTensor, or all of a plain tensor, sharing its memory."""
        with torch.no_grad():
            return Shard(local_tensor(tensor.detach()), tuple(tensor.shape), local_box(tensor).offsets)

    def write_items(self, name: str) -> list[WriteItem]:
        """What DCP should write for this shard."""
        properties = TensorProperties(dtype=torch.float32 if is_quantized(self.local) else self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.shape)),
            )
            for chunk in self.chunks()
        ]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """The region of the whole tensor that this shard is."""
        if self.local.numel() == 0 and 0 not in self.shape:
            return []  # a rank beyond the end of a short tensor
        return [ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.local.size())]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint has it: its whole shape and how its numbers are stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_shards(folder: Path, shards: Mapping[str, Shard], ranks: Ranks) -> dict[str, FileRecord]:
    """Write the shards of all ranks; returns the files that this rank wrote. All ranks must call it together.

    Raises OSError or RuntimeError, the same on every rank.
    """
    writer = _Writer(folder)
    # DCP warns once when it runs in a single process; here that is meant.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        dcp.save(
            dict(shards),
            storage_writer=writer,
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as failure:  # a BaseException
        raise _plain_error(failure) from failure
    return writer.files.records


def load_shards(folder: Path, shards: Mapping[str, Shard], metadata: Metadata, ranks: Ranks) -> None:
    """Fill shards in place from a folder, whatever layout it was saved with. All ranks must call it together.

    Raises OSError or RuntimeError, the same on every rank; some shards may be filled by then.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        dcp.load(
            dict(shards),
            storage_reader=_Reader(folder, metadata),
            planner=_LoadPlanner(),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as failure:
        raise _plain_error(failure) from failure


def stored_tensors(metadata: Metadata) -> dict[str, StoredTensor]:
    """Name, shape and dtype of every tensor in a checkpoint."""
    return {
        name: StoredTensor(tuple(stored.size), stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def read_metadata(folder: Path) -> Metadata:
    """Read `tensors.json`; the caller has compared its checksum with the manifest."""
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in json.loads((folder / TENSORS_NAME).read_bytes()).items():
        chunks = []
        for chunk in entry["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk["sizes"])))
            places[MetadataIndex(name, offsets)] = _StorageInfo(chunk["file"], chunk["start"], chunk["length"])
        properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
        described[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(state_dict_metadata=described, storage_data=places)


def _metadata_json(metadata: Metadata, places: Mapping[MetadataIndex, _StorageInfo]) -> bytes:
    described = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata), f"{name} is not a tensor"
        chunks = []
        for chunk in stored.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            chunks.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "length": place.length,
                }
            )
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        described[name] = {"dtype": dtype, "shape": list(stored.size), "chunks": chunks}
    return json.dumps(described).encode()


class _RecordingFiles(FileSystem):
    """A file system that remembers size and checksum of every file written through it."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        assert mode == "wb", "this file system only writes"
        with HashingWriter(path) as file:
            try:
                yield file
            except RuntimeError as error:
                raise file.failure or error from None
        self.records[Path(path).name] = FileRecord(file.num_bytes, file.sha256)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _SavePlanner(DefaultSavePlanner):
    """DCP's planner for shards; an 8-bit state becomes float32 only when its turn to be written comes."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, shard in self.state_dict.items() for item in shard.write_items(name)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return as_plain(self.state_dict[index.fqn].local)


class _LoadPlanner(DefaultLoadPlanner):
    """DCP's planner for shards. An 8-bit state is read into float32 first, and quantised when it is complete."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        self._buffers: dict[str, Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, shard in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, shard.chunks())
        return LoadPlan(items)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self._num_reads_left = Counter(item.dest_index.fqn for item in new_plan.items)
        return new_plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        local: Tensor = self.state_dict[index.fqn].local
        if not is_quantized(local):
            return local
        if index.fqn not in self._buffers:
            self._buffers[index.fqn] = torch.empty(local.shape, dtype=torch.float32, device="cpu")
        return self._buffers[index.fqn]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        name = read_item.dest_index.fqn
        self._num_reads_left[name] -= 1
        if self._num_reads_left[name] == 0 and name in self._buffers:
            requantize(self.state_dict[name].local, self._buffers.pop(name))


class _Writer(FileSystemWriter):
    """DCP's writer, which also hashes its files and writes `tensors.json`."""

    def __init__(self, folder: Path) -> None:
        # No copying ahead: with it, a background thread would make a context on the first accelerator.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = self.files = _RecordingFiles()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        places = {result.index: result.storage_data for rank_results in results for result in rank_results}
        content = _metadata_json(metadata, places)
        write_whole(Path(self.path) / TENSORS_NAME, content)
        self.files.records[TENSORS_NAME] = FileRecord.of(content)


class _Reader(FileSystemReader):
    """DCP's reader with the metadata we read from JSON; `.metadata` is not opened."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


def _plain_error(failure: CheckpointException) -> Exception:
    """The error behind DCP's own: an OSError if that is what failed, chosen so that all ranks judge alike."""
    causes = [(rank, cause) for rank, (cause, _) in sorted(failure.failures.items())]
    system = [(rank, cause) for rank, cause in causes if isinstance(cause, OSError) and cause.errno is not None]
    if len(system) < len(causes):
        return RuntimeError(str(failure))
    rank, cause = next((pair for pair in system if not may_pass(pair[1])), system[0])
    return OSError(cause.errno, f"{cause.strerror} (on rank {rank})", cause.filename)
