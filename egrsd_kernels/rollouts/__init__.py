"""Rollouts, on disk and on a page to read.

On disk they are JSON lines in UTF-8: one :class:`Rollout` a line, one object a rollout.

=================== ================= ============= ==================================================================
field               type              unit          meaning
=================== ================= ============= ==================================================================
prompt              string                          what the student was asked
tokens              array of strings                the decoded tokens of the response, one string each
entropy             array of numbers  nats          teacher's entropy H at each token
lookahead_entropy   array of numbers  nats          H filtered over the lookahead window, H^CL
gate                array of numbers                ω
magnitude           array of numbers                w, clipped
log_ratio           array of numbers  nats          δ = log p_T − log p_S of the token
token_advantage     array of numbers                Â = A · w · ω
reward              number or null                  r of the rollout; null: nothing could judge it
advantage           number                          A of the rollout
student_logp        array of numbers  nats          optional: log p_S of the token
teacher_logp        array of numbers  nats          optional: log p_T of the token
vocab_size          integer ≥ 2       entries       optional: V, which scales the entropies for the regimes
step                integer ≥ 0       steps         optional: the optimizer step that the rollout was sampled for
reference           string                          optional: the reference solution that the teacher saw
title               string                          optional: a heading
=================== ================= ============= ==================================================================

Every array has one entry for each token. An optional field may be null. A number that is not finite is written as
Python's json does: NaN, Infinity, -Infinity. Fields of other names are allowed, and not read.

A run keeps its files in one folder, at any depth, under names that match ``rollouts*.jsonl``: one for each process
that appends, so that none waits for another, or one for each step that is written whole.
"""

from .files import append_rollouts, find_rollout_files, read_rollouts, write_rollouts
from .page import write_token_report
from .record import Rollout

__all__ = [
    "Rollout", "append_rollouts", "find_rollout_files", "read_rollouts", "write_rollouts", "write_token_report",
]  # fmt: skip
