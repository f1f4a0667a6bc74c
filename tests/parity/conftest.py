"""The models that the tests of this folder compare, and the figures they find."""

from pathlib import Path

import pytest


def pytest_ignore_collect(config):
    """Leaves these files alone unless they are asked for: torch and diffusers take seconds to import."""
    wanted = config.getoption("markexpr") or ""
    return None if "parity" in wanted and "not parity" not in wanted else True


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.parity)
            # Warnings of torch, diffusers and transformers are not ours to mend.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """SD1-like: convolutions as projections, one number of heads, quick_gelu, noise prediction."""
    from pairs import SD1_TEXT, SD1_UNET, make_pair

    return make_pair(tmp_path_factory.mktemp("sd1"), SD1_UNET, SD1_TEXT, {}, seed=10)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """SD2-like: dense projections, heads per level, gelu, v-prediction."""
    from pairs import SD2_TEXT, SD2_UNET, make_pair

    return make_pair(tmp_path_factory.mktemp("sd2"), SD2_UNET, SD2_TEXT, {"prediction_type": "v_prediction"}, seed=20)


@pytest.fixture(params=["sd1", "sd2"])
def pair(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def figures():
    """Collects (what, error); printed at the end, so that a README can quote them."""
    rows: dict[str, float] = {}
    yield rows
    if rows:
        print("\n" + "\n".join(f"{name:70} {value:.3g}" for name, value in rows.items()))
