"""Every mutation and every correct variant, in the order of the published table."""

from __future__ import annotations

from activation_mutations import ACTIVATIONS
from alone_mutations import MODEL_ALONE
from bundle_mutations import ARCHIVE
from checkpoint_mutations import CHECKPOINT_FILE, CODES_FILE, METRICS_FILE, RECORD_FILE
from correct_variants import VARIANTS
from engine_mutations import ENGINE_FILES, EXPORTED_LAYERS
from external_mutations import EXTERNAL
from golden_mutations import GOLDEN_FILE
from graph_mutations import GRAPH
from manifest_mutations import MANIFEST_FILE
from onnx_mutations import WEIGHTS, WHOLE
from packed_mutations import PACKED_ALONE, PACKED_FILE
from placed_mutations import PLACED_FILE
from unpacked_mutations import UNPACKED_FILES

__all__ = ["MUTATIONS", "VARIANTS"]

MUTATIONS = [
    *WEIGHTS,
    *GRAPH,
    *ACTIVATIONS,
    *WHOLE,
    *EXTERNAL,
    *CODES_FILE,
    *CHECKPOINT_FILE,
    *METRICS_FILE,
    *RECORD_FILE,
    *MODEL_ALONE,
    *PACKED_FILE,
    *PACKED_ALONE,
    *GOLDEN_FILE,
    *EXPORTED_LAYERS,
    *PLACED_FILE,
    *ENGINE_FILES,
    *MANIFEST_FILE,
    *ARCHIVE,
    *UNPACKED_FILES,
]
