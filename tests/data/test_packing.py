from __future__ import annotations

import numpy as np
import torch

from titanmoe.data.packing import IGNORED, Window, pack

PAD = 99


def window(tokens: list[int], starts: tuple[int, ...] = ()) -> Window:
    return Window(np.array(tokens, dtype=np.int32), starts)


def test_a_row_without_document_masks():
    batch = pack([window([5, 6, 7, 8, 9], (0, 2))], 4, PAD, document_mask=False)
    assert batch.tokens_BS.tolist() == [[5, 6, 7, 8]]
    assert batch.labels_BS.tolist() == [[6, 7, 8, 9]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3]]
    assert batch.cu_seqlens is None
    assert {batch.tokens_BS.dtype, batch.labels_BS.dtype, batch.position_ids_BS.dtype} == {torch.int64}


def test_documents_are_segments():
    rows = [
        window([5, 6, 7, 8, 9, 10, 11], (2, 3, 5)),  # begins within a document; one of a single token
        window([1, 2, 3, 4, 5, 6, 7], (0, 6)),  # a document begins at the last token, which is only a label
    ]
    batch = pack(rows, 6, PAD, document_mask=True)
    assert batch.labels_BS.tolist() == [[6, IGNORED, IGNORED, 9, IGNORED, 11], [2, 3, 4, 5, 6, IGNORED]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 0, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5, 6, 12]


def test_padding_is_not_supervised():
    rows = [window([5, 6, 7], (1,)), window([]), window([1, 2, 3, 4, 5]), window([1, 2, 3, 4])]
    batch = pack(rows, 4, PAD, document_mask=True)
    assert batch.tokens_BS.tolist() == [[5, 6, 7, PAD], [PAD] * 4, [1, 2, 3, 4], [1, 2, 3, 4]]
    assert batch.labels_BS.tolist() == [[IGNORED, 7, IGNORED, IGNORED], [IGNORED] * 4, [2, 3, 4, 5], [2, 3, 4, IGNORED]]
    assert batch.position_ids_BS.tolist() == [[0, 0, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 1, 3, 4, 8, 12, 16]
    assert pack(rows, 4, PAD, document_mask=False).labels_BS.tolist()[0] == [6, 7, IGNORED, IGNORED]


def test_moving_a_batch():
    batch = pack([window([1, 2, 3])], 2, PAD, document_mask=True).to("meta")
    assert batch.tokens_BS.is_meta and batch.cu_seqlens is not None and batch.cu_seqlens.is_meta
    assert pack([window([1, 2, 3])], 2, PAD, document_mask=False).to("meta").cu_seqlens is None
