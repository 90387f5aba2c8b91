"""MDPD's losses against the numerical vector TV7, the parameter budget, and their invariances."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.config import DistillConfig, LossConfig, load_config
from mdpd_deploy.distill import Bottleneck, FeatureDistiller, Generator, weighted_distance
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify, Regress
from mdpd_deploy.tasks.losses import logits_loss

EVERY = LossConfig(logits_form="mse", logits_where="all")  # Eq. 3


def fill(t, *shape):
    count = int(np.prod(shape))
    return 0.5 * torch.sin(t + 0.7 * torch.arange(count, dtype=torch.float64)).reshape(shape)


def tap(layer, *shape):
    count = int(np.prod(shape))
    return torch.sin(0.3 * torch.arange(count, dtype=torch.float64) + layer).reshape(shape)


def make(**options):
    layers = options.pop("layers", [1, 2])
    config = DistillConfig(**{"bottleneck": 2, **options.pop("config", {})})
    features = dict.fromkeys(layers, Layout(2))
    arguments = dict(protect_first=False) | options
    return FeatureDistiller([Layout(4)] * (layers[-1] + 1), features, config=config, **arguments)


@pytest.fixture
def tv7():
    distiller = make().double()
    for phi in distiller.phi.values():
        phi.down.weight.data = fill(1, 2, 2).T.contiguous()
        phi.up.weight.data = fill(2, 2, 4).T.contiguous()
        phi.down.bias.data.zero_()
        phi.up.bias.data.zero_()
    gen = distiller.gen["2"]
    gen.first.weight.data = fill(5, 4, 3).unsqueeze(1)
    gen.first.bias.data = fill(6, 4)
    gen.second.weight.data = fill(7, 4, 3).unsqueeze(1)
    gen.second.bias.data = fill(8, 4)
    distiller.mask_token["4"].data = fill(4, 4)
    return distiller


def test_tv7(tv7):
    b, s = tap(5, 1, 3, 4), tap(6, 1, 3, 2)
    hidden = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    shallow, deep = tv7({1: s, 2: s}, [b, b, b], hidden, None)
    assert shallow.item() == pytest.approx(7.209928, abs=1e-5)
    assert deep.item() == pytest.approx(7.218394, abs=1e-5)
    rows = tv7.student(2, s, hidden, None)[0]
    expected = [
        [0.495380, 0.331485, -0.150732, 0.167511],
        [0.495489, 0.331485, -0.437031, 0.358781],
        [0.495218, 0.331485, -0.443781, 0.142477],
    ]
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    y_s, y_b = torch.tensor([[0.5, 0.1, -0.2]]), torch.tensor([[0.2, -0.1, 0.4]])
    assert float(logits_loss(y_b, y_s, EVERY)) == pytest.approx(0.49, abs=1e-6)


def test_mean_option_is_the_sum_over_tokens_and_channels_divided(tv7):
    mean = make(config={"feature_mean": True}).double()
    mean.load_state_dict(tv7.state_dict())
    b, s = tap(5, 1, 3, 4), tap(6, 1, 3, 2)
    shallow, _ = mean({1: s, 2: s}, [b, b, b], torch.zeros(1, 3), None)
    assert shallow.item() == pytest.approx(0.600827, abs=1e-5)


@pytest.mark.parametrize(("side_width", "expected"), [(384, 306_576), (96, 265_104)])
def test_budget_recipe_a(side_width, expected):
    distiller = FeatureDistiller(
        [Layout(768, (14, 14), 1)] * 13,
        dict.fromkeys(range(1, 13), Layout(side_width, (14, 14), 1)),
        protect_first=True,
        config=DistillConfig(),
    )
    norms = 25 * 2 * 768
    assert sum(p.numel() for p in distiller.parameters()) + norms == expected


def test_sherl_layers_split_six_and_five():
    layers = FeatureDistiller(
        [Layout(8)] * 13,
        dict.fromkeys(range(1, 12), Layout(8)),
        protect_first=True,
        config=DistillConfig(),
    )
    assert layers.shallow == (1, 2, 3, 4, 5, 6) and layers.deep == (7, 8, 9, 10, 11)


def test_padding_changes_no_loss():
    torch.manual_seed(0)
    distiller = make(protect_first=True).double()
    keys = np.arange(2)
    features = {layer: torch.randn(2, 5, 2, dtype=torch.float64) for layer in (1, 2)}
    taps = [torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(3)]
    pad = lambda x: torch.cat([x, torch.randn(2, 3, x.shape[-1], dtype=x.dtype)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    longer = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1)
    plain = distiller(features, taps, distiller.draw_mask(keys, 5, 0, 1), mask)
    padded = distiller(
        {layer: pad(x) for layer, x in features.items()},
        [pad(x) for x in taps],
        distiller.draw_mask(keys, 8, 0, 1),
        longer,
    )
    torch.testing.assert_close(padded, plain)


def test_the_mask_is_a_function_of_seed_step_and_example_alone():
    distiller = make(protect_first=True)
    both = distiller.draw_mask(np.array([3, 9]), 64, seed=1, step=5)
    alone = distiller.draw_mask(np.array([9]), 64, seed=1, step=5)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(alone, distiller.draw_mask(np.array([9]), 64, seed=1, step=6))
    assert not torch.equal(alone, distiller.draw_mask(np.array([9]), 64, seed=2, step=5))
    assert both[:, 0].sum() == 0  # the first token is never hidden
    many = distiller.draw_mask(np.arange(200), 65, seed=0, step=0)[:, 1:]
    assert 0.48 < float(many.mean()) < 0.52
    batch = make(config={"mask_level": "batch"}).draw_mask(np.array([3, 9]), 64, 1, 5)
    assert torch.equal(batch[0], batch[1])


def test_image_generator_keeps_prefix_tokens_and_equals_a_plain_convolution():
    torch.manual_seed(0)
    gen = Generator(Layout(4, (2, 3), 2))
    x = torch.randn(1, 8, 4)
    out = gen(x, None)
    assert torch.equal(out[:, :2], x[:, :2])
    image = x[:, 2:].transpose(1, 2).reshape(1, 4, 2, 3)
    expected = gen.second(gen.first(image).relu()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out[:, 2:], expected)


def test_only_hidden_tokens_count_in_the_deep_loss_and_targets_get_no_gradient():
    distiller = make()
    feature = torch.randn(1, 4, 2, requires_grad=True)
    target = torch.randn(1, 4, 4, requires_grad=True)
    hidden = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    _, deep = distiller({1: feature, 2: feature}, [target] * 3, hidden, None)
    expected = (distiller.student(2, feature, hidden, None) - target)[:, 1].square().sum()
    torch.testing.assert_close(deep, expected)
    deep.backward()
    assert target.grad is None and feature.grad is not None
    nothing = distiller({1: feature, 2: feature}, [target] * 3, torch.zeros(1, 4), None)[1]
    assert nothing.item() == 0


def test_sharing_makes_one_module_of_each():
    distiller = make(layers=[1, 2, 3, 4], config={"share_phi": True, "share_gen": True})
    assert len(distiller.phi) == len(distiller.gen) == 1
    bottleneck = Bottleneck(2, 2, 4)
    assert sum(p.numel() for p in bottleneck.parameters()) == (1 + 2 + 4) * 2 + 4


def test_weighted_distance_by_hand():
    student, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.zeros(1, 2, 2)
    assert float(weighted_distance(student, target, torch.tensor([[1.0, 0.5]]))) == 17.5


def test_task_losses_are_sums():
    raw, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    parts = Classify.numbered(3).loss(raw[:2], labels[:2]) + Classify.numbered(3).loss(
        raw[2:], labels[2:]
    )
    torch.testing.assert_close(Classify.numbered(3).loss(raw, labels), parts)
    weighted = Classify(tuple("abc"), class_weights=(2.0, 0.0, 1.0)).loss(raw, labels)
    terms = -raw.log_softmax(-1)[range(5), labels] * torch.tensor([2.0, 0.0, 1.0, 0.0, 2.0])
    torch.testing.assert_close(weighted, terms.sum())
    scores = torch.tensor([[1.0], [3.0]])
    assert float(Regress().loss(scores, torch.tensor([0.0, 1.0]))) == 5.0


def test_kl_is_zero_for_equal_and_equals_the_formula():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    config = LossConfig(logits_form="kl", temperature=3.0, logits_where="all")
    assert float(logits_loss(a, a, config)) == pytest.approx(0, abs=1e-5)
    p, q = (b / 3).softmax(-1), (a / 3).softmax(-1)
    torch.testing.assert_close(logits_loss(a, b, config), 9 * (p * (p / q).log()).sum())


def test_decoupled_distillation_is_kl_when_weighted_as_kl_does():
    """KL = KL over {label, rest} + (teacher's share of the rest) × KL among the rest."""
    student, teacher, labels = torch.randn(1, 4), torch.randn(1, 4), torch.tensor([2])
    rest = 1 - float((teacher / 3).softmax(-1)[0, 2])
    common = {"temperature": 3.0, "logits_where": "all"}
    decoupled = LossConfig(logits_form="dkd", beta=rest, **common)
    kl = LossConfig(logits_form="kl", **common)
    found = logits_loss(student, teacher, decoupled, labels)
    torch.testing.assert_close(found, logits_loss(student, teacher, kl))
    eight = logits_loss(student, teacher, LossConfig(logits_form="dkd", **common), labels)
    none = logits_loss(student, teacher, decoupled.model_copy(update={"beta": 0.0}), labels)
    torch.testing.assert_close(eight - none, 8 / rest * (found - none))
    pair = student[:, :2], teacher[:, :2], torch.tensor([1])  # two classes: there is no rest
    same = logits_loss(*pair[:2], kl)
    torch.testing.assert_close(logits_loss(pair[0], pair[1], decoupled, pair[2]), same)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as the memory forecast runs it
        logits_loss(
            torch.randn(5, 4), torch.randn(5, 4), decoupled, torch.zeros(5, dtype=torch.int64)
        )


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["loss.temperature=4", "loss.logits_form=mse"],
            r"loss\.temperature is not read by loss\.logits_form=mse",
        ),
        (["loss.beta=2", "loss.logits_form=kl"], r"loss\.beta is not read by .*=kl: leave it out"),
        (["loss.logits=0", "loss.logits_form=kl"], r"loss\.logits_form is not read with"),
    ],
)
def test_an_option_that_the_form_of_the_loss_would_ignore_is_refused(sets, message):
    with pytest.raises(UserError, match=message):
        load_config(None, {"method": "mdpd"}, sets)


def test_only_what_the_teacher_answers_better_is_distilled():
    config = LossConfig(logits_form="mse")
    labels = torch.tensor([0, 1, 0])
    student = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]])  # wrong, right, right and sure
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # right, wrong, right, less sure
    found = Classify.numbered(2).distance(student, teacher, labels, config)
    assert found == logits_loss(student[:1], teacher[:1], EVERY) == 2.0
    scores, answers = torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 2.0])
    nearer = torch.tensor([[0.5], [0.0]])  # nearer to 0, farther from 2
    assert Regress().distance(scores, nearer, answers, config) == 0.25
