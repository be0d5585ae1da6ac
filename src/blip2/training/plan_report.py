"""A plan as text for people, and as plain values for programs."""

from collections.abc import Iterator
from typing import Any

from blip2.training.accelerators import GIB
from blip2.training.plan import Plan

SMALLEST_SHARE = 0.001  # of a sample's operations; what is less goes into one line


def as_text(plan: Plan) -> str:
    """The plan in a page."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    processors = f"{plan.gpus} x {plan.accelerator.title}" if plan.gpus > 1 else plan.accelerator.title
    how = [plan.precision, *([plan.strategy] if plan.gpus > 1 else [])]
    how += ["activation checkpointing"] if plan.activation_checkpointing else []
    yield f"{plan.recipe} on {processors}: {', '.join(how)}"
    yield (
        f"{plan.steps:,} steps of {plan.samples:,} samples; {plan.micro_batch} at once on each, "
        f"{plan.accumulation} time{'s' if plan.accumulation > 1 else ''} a step"
    )
    yield ""
    yield f"{'Parameters':<34}{'frozen':>16}{'trained':>16}"
    for part in plan.parameters:
        yield f"  {part.name:<32}{part.frozen:>16,}{part.trained:>16,}"
    frozen, trained = (sum(getattr(part, kind) for part in plan.parameters) for kind in ("frozen", "trained"))
    yield f"  {'in all':<32}{frozen:>16,}{trained:>16,}"
    yield ""
    yield f"{'Memory of one at its fullest':<34}{'GiB':>16}"
    for part in plan.memory:
        yield f"  {part.name:<32}{part.bytes / GIB:>16.2f}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"  {f'in all, of {plan.accelerator.memory_bytes / GIB:.1f}':<32}{plan.memory_bytes / GIB:>16.2f}   {verdict}"
    yield ""
    yield f"{'Work of one sample, GFLOP':<34}{'forward':>16}{'backward':>16}"
    small = [part for part in plan.work if part.total < SMALLEST_SHARE * plan.flops_per_sample]
    for part in plan.work:
        if part not in small:
            yield f"  {part.name:<32}{part.forward / 1e9:>16,.1f}{part.backward / 1e9:>16,.1f}"
    if small:
        forward, backward = (sum(getattr(part, way) for part in small) / 1e9 for way in ("forward", "backward"))
        yield f"  {'smaller parts':<32}{forward:>16,.1f}{backward:>16,.1f}"
    yield f"  {'in all':<32}{plan.flops_per_sample / 1e9:>32,.1f}"
    yield ""
    peak = plan.accelerator.flops(plan.precision) / 1e12
    yield f"At {plan.utilisation:.0%} of {peak:,.3g} TFLOP/s each"
    yield f"  {plan.samples_per_second:,.1f} samples a second, {duration(plan.days)}"
    if plan.price is not None:
        yield f"  {plan.price:,.0f} in all, {plan.days * 24 * plan.gpus:,.0f} processor hours"
    if plan.notes:
        yield ""
        yield from (f"- {note}" for note in plan.notes)
    if plan.advice:
        yield ""
        yield "It would fit with"
        yield from (f"  {way}" for way in plan.advice)


def duration(days: float) -> str:
    """A time as people say it."""
    hours = days * 24
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{days:.1f} days"


def as_record(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; sizes in bytes, operations in FLOP."""
    return {
        "recipe": plan.recipe,
        "stage": plan.stage,
        "gpu": plan.accelerator.name,
        "gpus": plan.gpus,
        "strategy": plan.strategy,
        "precision": plan.precision,
        "activation_checkpointing": plan.activation_checkpointing,
        "steps": plan.steps,
        "batch_size": plan.samples,
        "micro_batch_per_gpu": plan.micro_batch,
        "accumulation": plan.accumulation,
        "parameters": {part.name: {"frozen": part.frozen, "trained": part.trained} for part in plan.parameters},
        "memory_bytes": {part.name: round(part.bytes) for part in plan.memory},
        "memory_bytes_in_all": round(plan.memory_bytes),
        "memory_bytes_there": round(plan.accelerator.memory_bytes),
        "fits": plan.fits,
        "flops_per_sample": {part.name: {"forward": part.forward, "backward": part.backward} for part in plan.work},
        "flops_per_sample_in_all": plan.flops_per_sample,
        "utilisation": plan.utilisation,
        "samples_per_second": plan.samples_per_second,
        "days": plan.days,
        "price": plan.price,
        "notes": list(plan.notes),
        "advice": list(plan.advice),
    }
