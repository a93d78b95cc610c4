# SPDX-License-Identifier: Apache-2.0
"""Distillation and learning rates: values by hand and by brute force, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obs_kernels import OBSConfig
from obs_kernels.errors import ConfigError
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.recipes import Recipe, TrainingSettings
from obs_kernels.training import Distiller, learning_rate_schedule
from obs_kernels.training.distillation import distillation_term, hidden_term
from obs_kernels.training.learning_rates import learning_rate_factor


def kl(teacher: Tensor, student: Tensor, temperature: float) -> float:
    """T^2 sum p log(p / q), one distribution, in f64 and by its definition."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    return temperature**2 * float((p * (p / q).log()).sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.5])
def test_spans_are_averaged_over_windows_and_outputs_without_padding(gen, temperature):
    shape, lengths = (3, 7), (7, 4, 2)
    student, teacher = ({k: torch.randn(shape, generator=gen) for k in ("start_logits", "end_logits")} for _ in "st")
    mask = torch.stack([(torch.arange(7) < length).long() for length in lengths])
    wanted = sum(
        kl(teacher[name][i, :length], student[name][i, :length], temperature)
        for name in student
        for i, length in enumerate(lengths)
    )
    got = distillation_term(student, teacher, temperature=temperature, attention_mask=mask)
    assert got.item() == pytest.approx(wanted / 6, rel=1e-5)
    wild = {name: values.masked_fill(mask == 0, 1e4) for name, values in teacher.items()}
    assert distillation_term(student, wild, temperature=temperature, attention_mask=mask).item() == got.item()


def test_classes_are_averaged_over_samples_and_vocabularies_over_tokens(gen):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for shape, items in (((2, 3), 2), ((2, 3, 5), 5)):
        student, teacher = (torch.randn(shape, generator=gen) for _ in "st")
        live = mask.bool() if len(shape) == 3 else slice(None)
        wanted = sum(kl(t, s, 2.0) for t, s in zip(teacher[live], student[live], strict=True)) / items
        # [2, 3] classes: of the shape of the mask, and yet no tokens
        got = distillation_term({"logits": student}, {"logits": teacher}, outputs=("logits",), attention_mask=mask)
        assert got.item() == pytest.approx(wanted, rel=1e-5)


class Answerer(nn.Module):
    """[B, T] start and end logits, or [B, labels]."""

    def __init__(self, *, spans: bool = True, labels: int = 2) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(11, 2 if spans else labels), nn.Dropout(0.5)
        self.spans = spans

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        found = self.drop(self.table(input_ids))
        return {"start_logits": found[..., 0], "end_logits": found[..., 1]} if self.spans else {"logits": found.sum(1)}


INPUTS = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}


def test_the_loss_mixes_task_and_teacher_and_reaches_only_the_student():
    student, teacher = Answerer(), Answerer()
    teacher.train()
    for hardness in (0.0, 0.3, 1.0):
        distiller = Distiller(teacher, hardness=hardness)
        assert not any(module.training for module in teacher.modules())
        student.zero_grad()
        given = student(**INPUTS)
        task = given["start_logits"].square().mean()
        term = distillation_term(given, teacher(**INPUTS), attention_mask=INPUTS["attention_mask"])
        loss = distiller.loss(task, given, INPUTS)
        torch.testing.assert_close(loss, (1 - hardness) * task + hardness * term)
        loss.backward()
        assert student.table.weight.grad is not None and teacher.table.weight.grad is None
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ConfigError, match="task must be the loss on the labels for hardness"):
        Distiller(teacher, hardness=0.5).loss(None, student(**INPUTS), INPUTS)


def layers(gen, count, shape=(2, 3, 4)):
    return tuple(torch.randn(shape, generator=gen) for _ in range(count))


def test_hidden_states_count_by_their_share_of_the_teacher_without_padding_and_embeddings(gen):
    student, teacher = layers(gen, 3), layers(gen, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    wanted = 0.0
    for mine, theirs in zip(student[1:], teacher[1:], strict=True):
        apart = size = 0.0
        for sample, token in mask.nonzero().tolist():
            apart += float((mine[sample, token].double() - theirs[sample, token].double()).square().sum())
            size += float(theirs[sample, token].double().square().sum())
        wanted += apart / size / 2
    got = hidden_term({"hidden_states": student}, {"hidden_states": teacher}, attention_mask=mask)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(wanted, rel=1e-5)
    student[2][0, 2], teacher[1][0, 2] = 1e4, -1e4
    student[0].fill_(7.0)
    again = hidden_term({"hidden_states": student}, {"hidden_states": teacher}, attention_mask=mask)
    assert again.item() == got.item()
    student[1][0, 2], teacher[2][0, 2] = float("nan"), float("inf")
    spoiled = hidden_term({"hidden_states": student}, {"hidden_states": teacher}, attention_mask=mask)
    assert spoiled.item() == got.item()
    student[1][0, 2], teacher[2][0, 2] = 0.0, 1.0
    everywhere = hidden_term({"hidden_states": student}, {"hidden_states": teacher})
    assert everywhere.item() != pytest.approx(wanted, rel=1e-2)


def test_every_kth_layer_of_a_deeper_teacher_is_compared(gen):
    teacher = layers(gen, 7)
    student = (teacher[0], teacher[3], teacher[6])  # layers 3 and 6 of 6
    assert hidden_term({"hidden_states": student}, {"hidden_states": teacher}).item() == 0.0
    student = (teacher[0], teacher[2], teacher[5])
    assert hidden_term({"hidden_states": student}, {"hidden_states": teacher}).item() > 0.1


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (None, 3, "the student does not give"),
        (3, None, "the teacher does not give"),
        (3, 4, r"2 layers, or a multiple, of \[2, 3, 4\], got 3 of \[2, 3, 4\]"),
        (4, 3, "3 layers"),
        (3, (2, 3, 5), r"got 2 of \[2, 3, 5\]"),
    ],
)
def test_layers_that_do_not_fit_are_refused(gen, student, teacher, says):
    def outputs(what):
        if what is None:
            return {"logits": torch.zeros(2, 3)}
        return {"hidden_states": layers(gen, what) if isinstance(what, int) else layers(gen, 3, what)}

    with pytest.raises(ConfigError, match=says):
        hidden_term(outputs(student), outputs(teacher))


class Stack(Answerer):
    """With hidden states, if asked."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> dict[str, Any]:
        found: dict[str, Any] = dict(super().forward(input_ids, attention_mask))
        states = [self.embed(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return found | ({"hidden_states": tuple(states)} if output_hidden_states else {})


@pytest.mark.parametrize("hidden", [0.0, 0.7])
def test_hidden_states_are_added_by_their_factor_and_teach_the_layers(hidden):
    student, teacher = Stack(), Stack()
    distiller = Distiller(teacher, hidden=hidden)
    assert distiller.options == ({"output_hidden_states": True} if hidden else {})
    distiller.check(student, INPUTS)
    student.train()
    given = student(**INPUTS, **distiller.options)
    loss = distiller.loss(None, given, INPUTS)
    wanted = teacher(**INPUTS, output_hidden_states=True)
    term = distillation_term(given, wanted, attention_mask=INPUTS["attention_mask"])
    term = term + hidden * hidden_term(given, wanted) if hidden else term
    assert loss.item() == pytest.approx(term.item(), rel=1e-6)
    loss.backward()
    assert all((layer.weight.grad is not None) == bool(hidden) for layer in student.layers)
    assert all(layer.weight.grad is None for layer in teacher.layers)


def test_a_teacher_without_fitting_layers_is_refused_before_the_training():
    with pytest.raises(ConfigError, match="set hidden to 0"):
        Distiller(Stack(width=6), hidden=1.0).check(Stack(), INPUTS)
    Distiller(Stack(width=6)).check(Stack(), INPUTS)
    with pytest.raises(ConfigError, match="hidden must be at least 0, got -1"):
        Distiller(Stack(), hidden=-1)


def test_a_model_that_teaches_itself_is_copied():
    student = Answerer().eval()
    distiller = Distiller.of_copy(student)
    given = student(**INPUTS)
    assert distiller.loss(None, given, INPUTS).item() == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        student.table.weight.add_(torch.randn_like(student.table.weight))
    assert distiller.loss(None, student(**INPUTS), INPUTS).item() > 1e-3
    assert all(p.requires_grad for p in student.parameters())


def test_teachers_with_another_head_are_refused_before_training():
    student = Answerer().train()
    with pytest.raises(ConfigError, match="names 'start_logits', which the teacher does not give"):
        Distiller(Answerer(spans=False)).check(student, INPUTS)
    with pytest.raises(
        ConfigError, match=r"logits of the teacher must be \[2, 2\] .* got \[2, 3\]; the teacher has an"
    ):
        Distiller(Answerer(spans=False, labels=3), outputs=("logits",)).check(Answerer(spans=False), INPUTS)
    Distiller(Answerer()).check(student, INPUTS)
    assert all(module.training for module in student.modules())
    for settings, text in (
        ({"hardness": 1.5}, "hardness must be 0 to 1"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"outputs": ()}, "outputs must name"),
    ):
        with pytest.raises(ConfigError, match=text):
            Distiller(Answerer(), **settings)


def rates(shape: str, **settings: object) -> list[float]:
    factor = learning_rate_factor(shape, **settings)  # type: ignore[arg-type]
    return [factor(step) for step in range(int(settings["total_steps"]))]  # type: ignore[call-overload]


def test_curves_by_hand():
    assert rates("constant", total_steps=3) == [1.0, 1.0, 1.0]
    assert rates("linear", total_steps=5, final_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates("linear", total_steps=5, final_factor=0.5, first_step=2) == pytest.approx([1, 1, 1, 0.75, 0.5])
    # two steps, three, and what is left of three
    cyclic = rates("cyclic_linear", total_steps=7, final_factor=0.1, starts=(0, 2, 5))
    assert cyclic == pytest.approx([1.0, 0.1, 1.0, 0.55, 0.1, 1.0, 0.1])
    assert rates("cyclic_linear", total_steps=3, final_factor=0.0, starts=(0, 1, 2)) == [1.0, 1.0, 1.0]
    assert rates("linear", total_steps=4, final_factor=1.0, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cycles_begin_at_the_prunings():
    """The 30-epoch recipes: falls over epochs 0-2, then 4-epoch cycles from the first pruning to the end."""
    epoch = 10
    schedule = PruningSchedule(start_epoch=2, end_epoch=26, update_frequency=4, shape="cubic", initial_sparsity=0.7)
    training = TrainingSettings(epochs=30, lr_schedule="cyclic_linear")
    recipe = Recipe("r", training, pruning=OBSConfig(pattern="unstructured:0.9"), schedule=schedule)
    starts = recipe.cycle_starts(epoch)
    assert starts == tuple(epoch * e for e in (0, 2, 6, 10, 14, 18, 22, 26))
    assert {p.step for p in schedule.prunings(recipe.pruning.parsed_pattern, epoch)} <= set(starts)
    factor = learning_rate_factor("cyclic_linear", total_steps=300, final_factor=0.1, starts=starts)
    assert all(factor(start) == 1.0 for start in starts)
    assert all(factor(start - 1) == pytest.approx(0.1) for start in (*starts[1:], 300))


def test_the_scheduler_sets_the_rate_of_each_step_and_resumes():
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        settings = SimpleNamespace(total_steps=6, final_factor=0.2, starts=(0, 3))
        return optimizer, learning_rate_schedule(optimizer, "cyclic_linear", **settings.__dict__)

    optimizer, scheduler = build()
    seen = []
    for step in range(6):
        if step == 2:
            state = scheduler.state_dict()
            optimizer, scheduler = build()
            scheduler.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.5, 0.3, 0.1, 0.5, 0.3, 0.1])


@pytest.mark.parametrize(
    ("shape", "settings", "text"),
    [
        ("cosine", {}, "lr_schedule must be one of constant, linear, cyclic_linear, got 'cosine'"),
        ("linear", {"total_steps": 0}, "total_steps must be at least 1"),
        ("linear", {"final_factor": 2.0}, "final_factor must be 0 to 1"),
        ("cyclic_linear", {"starts": (3, 1)}, "starts must ascend"),
        ("cyclic_linear", {"starts": ()}, "starts must ascend"),
    ],
)
def test_bad_curves_are_refused(shape, settings, text):
    with pytest.raises(ConfigError, match=text):
        learning_rate_factor(shape, **({"total_steps": 4} | settings))
