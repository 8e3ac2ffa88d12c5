"""Pictures of the policy in TensorBoard, read back from the events."""

import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from policy.space import build_space
from quant.formats import parse_search_space
from trainer.training.policy_plots import CELL, TAG, legend, show_policy

SPACE = build_space(["first", "last"], parse_search_space("2,4,e4m3"))


def test_a_row_a_decision_and_a_column_a_format(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    callback = TensorBoardCallback()
    callback.tb_writer = writer
    shares = [[1.0, 0.0, 0.0], [0.2, 0.2, 0.6]]
    entries = [{"step": 1, "probabilities": shares}, {"step": 2}, {"step": 11, "probabilities": shares[::-1]}]
    show_policy([object(), callback], SPACE, entries)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    pictures = events.Images(TAG)
    assert [picture.step for picture in pictures] == [1, 11]
    seen = np.asarray(Image.open(io.BytesIO(pictures[0].encoded_image_string)).convert("L"), dtype=float) / 255
    np.testing.assert_allclose(seen[:: CELL[0], :: CELL[1]], shares, atol=1 / 255)
    assert b"1. first\n2. last" in events.Tensors(f"{TAG}/text_summary")[0].tensor_proto.string_val[0]


def test_columns_are_named_by_the_formats():
    assert legend(SPACE).startswith("Columns, from the left: int2, int4, e4m3.")
    pairs = build_space(["a"], parse_search_space("4,8"), separate_activations=True)
    assert "int4, int4/int8, int8/int4, int8" in legend(pairs)


def test_without_tensorboard_nothing_happens():
    show_policy([], SPACE, [{"step": 1, "probabilities": [[1.0, 0.0, 0.0]] * 2}])
