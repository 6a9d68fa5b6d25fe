"""Triton twins of scoring, selection, gather and scatter, as operations that torch can compile.

Each file registers its operation beside its kernel. An operation is opaque to the compiler, has a
fake implementation, and is deterministic: one program writes each output element. Two functions
have gradients, though no second ones. ``spread`` is one operation:

    pool_gather     forward: gather means         backward: spread shares
    scatter_back    forward: spread outputs       backward: collect sums

``window`` registers attention over a window in the same way, with its backward, by the kernels of
``interval_attention``. ``flash4`` registers FlashAttention 4, and ``merge`` what joins its output
with that of the selected entries. ``document_selection`` selects by document. ``online_softmax``
joins what one rank's keys give with what another's do, and ``row_sums`` adds their gradients. These
two write into their arguments, and so do ``spread_with_seam`` and ``add_seam_sums``, which take
what has come from another chunk.
"""

from .document_selection import select_by_documents
from .flash4 import (
    check_flash4,
    flash4_backward,
    flash4_forward,
    flash4_is_installed,
    obstacle_to_flash4,
)
from .gather import gather_means, pool_gather, spread_shares
from .interval_attention import Before, Intervals, interval_backward, interval_forward
from .launch import check_supported, obstacle_to_kernels
from .merge import collect_merged, merge_outputs
from .online_softmax import merge_in_place
from .pooling import pool_coarsest
from .row_sums import add_rows
from .scatter import scatter_back
from .scoring import score, scores_by_pooling
from .seams import add_seam_sums, seam_sums
from .selection import select_from_norms
from .window import (
    dense_backward,
    dense_forward,
    halo_backward,
    halo_forward,
    window_backward,
    window_forward,
)

__all__ = [
    "Before",
    "Intervals",
    "add_rows",
    "add_seam_sums",
    "check_flash4",
    "check_supported",
    "collect_merged",
    "dense_backward",
    "dense_forward",
    "flash4_backward",
    "flash4_forward",
    "flash4_is_installed",
    "gather_means",
    "halo_backward",
    "halo_forward",
    "interval_backward",
    "interval_forward",
    "merge_in_place",
    "merge_outputs",
    "obstacle_to_flash4",
    "obstacle_to_kernels",
    "pool_coarsest",
    "pool_gather",
    "scatter_back",
    "score",
    "scores_by_pooling",
    "seam_sums",
    "select_by_documents",
    "select_from_norms",
    "spread_shares",
    "window_backward",
    "window_forward",
]
