"""torch's random numbers, against what torch prints."""

import numpy as np

from jaxdiff.sampling.torch_noise import TorchGenerator, torch_latents

# torch.randn(5) and torch.randn(20) after torch.manual_seed(0), torch 2.13 on a CPU.
FIVE = [1.5409960746765137, -0.293428897857666, -2.1787893772125244, 0.5684312582015991, -1.0845223665237427]
TWENTY = [
    -1.1258398294448853, -1.1523602008819580, -0.2505785822868347, -0.4338788390159607, 0.5988394618034363,
    -1.5550950765609741, -0.3413603901863098, 1.8530061244964600, 0.4680964052677155, -0.1577124446630478,
    1.4436601400375366, 0.2660494148731232, 1.3893661499023438, 1.5863342285156250, 0.9462983608245850,
    -0.8436767458915710, 0.9318265914916992, 1.2590092420578003, 2.0049805641174316, 0.0537369027733803,
]  # fmt: skip


def test_few_numbers_and_a_broken_block_of_sixteen_are_torchs():
    np.testing.assert_allclose(TorchGenerator(0).randn((5,)), FIVE, atol=1e-6)
    np.testing.assert_allclose(TorchGenerator(0).randn((4, 5)), np.reshape(TWENTY, (4, 5)), atol=1e-6)


def test_few_numbers_come_in_pairs_and_the_second_waits_for_the_next_call():
    generator = TorchGenerator(0)
    parts = [generator.randn((3,)), generator.randn(()).reshape(1), generator.randn((1,))]
    np.testing.assert_array_equal(np.concatenate(parts), TorchGenerator(0).randn((5,)))


def test_numbers_are_unit_normal_and_seeds_differ():
    draw = TorchGenerator(7).randn((100, 1000))
    assert abs(draw.mean()) < 0.01
    assert abs(draw.std() - 1) < 0.01
    assert abs(np.corrcoef(draw.ravel(), TorchGenerator(8).randn((100_000,)))[0, 1]) < 0.02


def test_latents_are_drawn_channels_first_one_after_another():
    latents = torch_latents(3, (2, 5, 4), 3)
    generator = TorchGenerator(3)
    for latent in latents:
        np.testing.assert_array_equal(latent, generator.randn((4, 2, 5)).transpose(1, 2, 0))
