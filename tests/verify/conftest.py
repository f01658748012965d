from __future__ import annotations

import pytest
from bisect_nets import Exported, export_net


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Weights of 4 bits, activations in float."""
    return export_net(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="session")
def mini_int8(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Weights of 4 bits, activations of 8, outputs of layers too."""
    return export_net(tmp_path_factory.mktemp("quantized"), activation_bits=8, quantize_outputs=True)
