"""A mixture with phases, lengthening rows and growing batches on two ranks, one of them killed."""

from __future__ import annotations

import signal
from pathlib import Path

from faults.harness import write_page
from faults.ranks import Pair
from ssmtrain.data.module import open_data

STEPS = 8
MIX = """
data:
  kind: mix
  seq_len: 32
  cache_dir: {folder}/cache
  seq_len_warmup: [{{until_tokens: 192, seq_len: 8}}]
  sources:
    prose: {{kind: text, train: {folder}/text.txt}}
    code: {{kind: text, train: {folder}/code.txt, val: {{a: {folder}/text.txt, b: {folder}/code.txt}}}}
  phases:
  - {{from_step: 0, weights: {{prose: 3, code: 1}}}}
  - {{from_step: 4, weights: {{prose: 1, code: 2}}}}
"""


def write_mixture(folder: Path) -> None:
    """The recipe of the other stories with two sources; 64 tokens a step, then 128, in micro-batches."""
    write_page(folder, STEPS, every=3)
    (folder / "code.txt").write_text("".join(f"x{i} = y + {i * i % 97}\n" for i in range(400)))
    page, growth = folder / "tiny.yaml", "global_batch_warmup: [{until_tokens: 200, global_batch: 64}]"
    kept = [line for line in page.read_text().splitlines() if not line.startswith("data:")]
    text = "\n".join(kept).replace("  threads: 1", f"  threads: 1\n  micro_batch: 1\n  {growth}")
    page.write_text(text + MIX.format(folder=folder))


def test_two_ranks_killed_after_every_change_read_what_one_reads(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    story = Pair(tmp_path, "killed")
    # A save is due after step 3: the steps from there on, over all changes, are done again.
    assert story.run({1: "after_optimizer:6"}).code == -signal.SIGKILL
    assert story.starts[-1].saved == 3
    first = story.ledger()
    assert len(first) == 5
    assert story.run().code == 0, story.starts[-1].output
    lines = story.ledger()
    assert lines[:5] == first, "losses, norms, rows and weights, to the bit"
    assert [line["tokens"] for line in lines] == [64, 128, 192, 256, 384, 512, 640, 768]
    mixture = open_data(story.open().config).train
    rows = [row for line in lines for row in line["samples"]]
    assert rows == mixture.names(mixture.samples(range(768 // 32)).tolist()), "as one rank reads them"
