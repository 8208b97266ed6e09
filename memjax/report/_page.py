"""The HTML page: words and numbers for the template, which only places and escapes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memjax._core.status import Status
from memjax._core.text import one_line
from memjax.report._folder import FAILED_ROWS, Audit, Detector
from memjax.report._images import PIXELATED_SIDE
from memjax.report._record import Record
from memjax.report._template import fill

_UNFOLDED = 12
"""Gallery cards shown at once; the others are one click away (no script: a details element)."""
_LISTED = 300
"""Longest list of anything else that grows with its input: metric rows, versions, statuses."""
_NONE = "\u2013"

MEANINGS = {
    "membership": {
        "against": "images the model was not trained on",
        "evidence": "the model was trained on the row",
    },
    "duplication": {
        "against": "training images known to occur once",
        "evidence": "the row occurs more than once in the training set",
    },
}
"""What a flag means, by what the calibration images are."""

STATUS_WORDS = {
    Status.NONFINITE: "a NaN or an infinity appeared in the input or inside the model",
    Status.UNDEFINED: "the quantity does not exist at this image",
    Status.NOT_CONVERGED: "an iteration ended on its budget",
    Status.BREAKDOWN: "an iteration closed early",
    Status.MAX_STEPS: "a solver used up its steps",
    Status.INPUT_CORRUPT: "the file could not be read as an image, or its pixels are not finite",
    Status.INPUT_MISMATCH: "the image was read but does not fit: wrong size, channels or type",
    Status.INDEFINITE: "a product was negative where theory says it cannot be",
}
"""Every failure a row can have, for people."""


def _number(value: Any, digits: int = 4) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return _NONE
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def _aligned(value: Any, digits: int = 4) -> str:
    """A measured number with all its digits, so that columns line up: 4.300 beside 4.271."""
    text = _number(value, digits)
    return text if text == _NONE or "," in text else f"{value:#.{digits}g}".removesuffix(".")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _NONE


def _percent(value: float) -> str:
    return _NONE if math.isnan(value) else f"{100.0 * value:.3g} %"


def _interval(record: Record) -> str:
    if record.flag("resolvable") is False:
        return "not resolvable"
    value, low, high = (record.number(key) for key in ("value", "low", "high"))
    if math.isnan(value):
        return _NONE
    if math.isnan(low) or math.isnan(high):
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _entry_text(entry: dict[str, Any], key: str, limit: int) -> str:
    value = entry.get(key)
    return one_line(str(value), limit=limit) if value is not None else ""


def _truth(entry: dict[str, Any]) -> dict[str, str]:
    """What is known of a row, by term; empty if nothing is."""
    known = {}
    multiplicity = entry.get("multiplicity")
    if isinstance(multiplicity, (int, float)) and not math.isnan(multiplicity):
        known["times in training"] = f"{multiplicity:,g}"
    elif entry.get("split") is not None:
        split = _entry_text(entry, "split", 40)
        known["in training"] = {"train": "yes", "heldout": "no"}.get(split, split)
    if isinstance(entry.get("extracted"), bool):
        known["extracted"] = "yes" if entry["extracted"] else "no"
    return known


def _flags(audit: Audit, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Per calibration: p-value, and in one word whether the primary detector flags the row."""
    out = []
    for calibration in audit.calibrations:
        suffix = f"{calibration.meaning}_{audit.primary.column}"
        p, flag = entry.get(f"p_{suffix}"), entry.get(f"flag_{suffix}")
        if entry.get(f"role_{calibration.meaning}") == "calibration":
            state = "calibration image"
        elif flag is None:
            state = "not tested"
        else:
            state = "flagged" if flag else "not flagged"
        out.append({"meaning": calibration.meaning, "p": _aligned(p, 2), "state": state,
                    "flagged": state == "flagged"})  # fmt: skip
    return out


def _row(audit: Audit, entry: dict[str, Any]) -> dict[str, Any]:
    """One ranked row in words, for its card and its line of the table."""
    others = [d for d in audit.detectors if d is not audit.primary]
    stored = entry.get("stored")
    return {
        "rank": _count(entry.get("rank")),
        "row": _count(entry.get("row")),
        "id": _entry_text(entry, "id", 80) or _NONE,
        "score": _aligned(entry.get(audit.primary.column)),
        "other_ranks": [_count(entry.get(f"{d.column}_rank")) for d in others],
        "other_titles": [d.title for d in others],
        "flags": _flags(audit, entry),
        "stored": stored is True,
        "stored_word": "no" if stored is False else _NONE,
        "copies": _count(entry.get("copies")),
        "distance": _aligned(entry.get("nearest_sample_distance"), 3),
        "truth": _truth(entry),
    }


def _findings(audit: Audit) -> list[dict[str, str]]:
    """The headline: what was found, in words that claim no more than was shown."""
    cards = []
    samples = audit.manifest.record("samples")
    stored = audit.metrics.record("stored").count("rows")
    if samples and stored is not None:
        rule = samples.text("rule", limit=80)
        drawn = _count(samples.count("count"))
        if stored:
            them = "each of them" if stored > 1 else "it"
            text = (
                f"At least one of {drawn} generated samples reproduces {them} under the copy "
                f"rule {rule}."
            )
            images = audit.metrics.record("stored").count("images")
            if images is not None and images != stored:
                text += f" Distinct images among them: {_count(images)}."
            if samples.count("copies") is not None:
                text += f" Samples that are copies: {_count(samples.count('copies'))}."
        else:
            text = (
                f"None of {drawn} generated samples reproduces a row under the copy rule {rule}. "
                "This does not show that nothing is memorized."
            )
        cards.append({"kind": "stored", "value": _count(stored), "label": "stored", "text": text})
    else:
        cards.append(
            {
                "kind": "absent",
                "value": "not checked",
                "label": "stored",
                "text": "No samples were generated, so this report calls no row stored.",
            }
        )
    cards += [_flag_card(audit, index) for index in range(len(audit.calibrations))]
    if not audit.calibrations:
        cards.append(
            {
                "kind": "absent",
                "value": "no flags",
                "label": "ranking only",
                "text": "No calibration images were given. The ranking orders the rows, but "
                "cannot say where memorization begins, so no row is flagged.",
            }
        )
    for contrast in audit.metrics.records("contrasts"):
        if contrast.values.get("detector") == audit.primary.name:
            auroc = contrast.record("auroc")
            value, low, high = (auroc.number(key) for key in ("value", "low", "high"))
            interval = "" if math.isnan(low + high) else f", interval {low:.3f} to {high:.3f}"
            cards.append(
                {
                    "kind": "plain",
                    "value": _NONE if math.isnan(value) else f"{value:.3f}",
                    "label": "AUROC against known truth",
                    "text": f"{audit.primary.title} separates images "
                    f"{contrast.text('positives', limit=80)} from images "
                    f"{contrast.text('negatives', limit=80)}{interval}. "
                    "Guessing gives 0.5, perfect separation 1.",
                }
            )
            break
    return cards


def _flag_card(audit: Audit, index: int) -> dict[str, str]:
    calibration = audit.calibrations[index]
    meaning = calibration.meaning
    record = calibration.record
    card = {
        "kind": "flagged",
        "value": _count(int(calibration.flagged.sum())),
        "label": f"flagged: {meaning}",
        "text": f"Of {_count(int(calibration.tested.sum()))} rows tested by "
        f"{audit.primary.title} against {_count(record.count('count'))} calibration images, at a "
        f"false-discovery rate of {_percent(record.number('fdr'))}. A flag is evidence that "
        f"{MEANINGS[meaning]['evidence']}.",
    }
    for flags in audit.metrics.records("flags"):
        mine = flags.values.get("meaning") == meaning
        if mine and flags.values.get("detector") == audit.primary.name:
            if flags.flag("resolvable") is False:
                card["text"] += (
                    " There are too few calibration images for any flag at this rate, however "
                    "high a score."
                )
            right, wrong = flags.count("true"), flags.count("false")
            if right is not None and wrong is not None and calibration.flagged.any():
                card["text"] += (
                    f" By the known truth {_count(right)} of them are right and "
                    f"{_count(wrong)} wrong."
                )
    return card


def _claims(audit: Audit) -> list[dict[str, str]]:
    """The three kinds of claim, from weak to strong, as far as this audit makes them."""
    if audit.calibrations:
        meanings = "; ".join(
            f"{c.meaning}: evidence that {MEANINGS[c.meaning]['evidence']}"
            for c in audit.calibrations
        )
        flag = (
            "The score stands out from those of calibration images more than chance allows, at a "
            f"controlled rate of false discoveries. {meanings[:1].upper()}{meanings[1:]}."
        )
    else:
        flag = "Not claimed here: there were no calibration images to compare with."
    if audit.manifest.record("samples"):
        stored = (
            "A generated sample reproduces the row under the copy rule. This is shown, not "
            "inferred. A row that is not called stored may still be memorized: more samples "
            "could reproduce it."
        )
    else:
        stored = "Not claimed here: no samples were generated."
    return [
        {
            "kind": "plain",
            "name": "Ranked",
            "text": "Every row has a score; larger means more signs of memorization. A rank alone "
            "proves nothing, since some row always comes first.",
        },
        {"kind": "flagged", "name": "Flagged", "text": flag},
        {"kind": "stored", "name": "Stored", "text": stored},
    ]


def _metric_table(audit: Audit) -> dict[str, Any]:
    """Metrics grouped by contrast, in the order of metrics.json."""
    contrasts = audit.metrics.records("contrasts")[:_LISTED]
    rates = sorted(
        {entry.number("fpr") for c in contrasts for entry in c.records("tpr_at_fpr")}, reverse=True
    )
    titles = {d.name: d.title for d in audit.detectors}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for contrast in contrasts:
        by_rate = {entry.number("fpr"): entry for entry in contrast.records("tpr_at_fpr")}
        name = str(contrast.values.get("detector"))
        sides = tuple(
            f"{contrast.text(side, limit=80)} ({_count(contrast.count(number))})"
            for side, number in (("positives", "n_positive"), ("negatives", "n_negative"))
        )
        groups.setdefault((sides[0], sides[1]), []).append(
            {
                "detector": titles.get(name, one_line(name, limit=60)),
                "cells": [
                    _interval(contrast.record("auroc")),
                    _interval(contrast.record("average_precision")),
                    *(_interval(by_rate[r]) if r in by_rate else _NONE for r in rates),
                ],
            }
        )
    level = audit.metrics.number("confidence")
    return {
        "level": "" if math.isnan(level) else _percent(level) + " ",
        "columns": ["AUROC", "Average precision", *(f"TPR at {_percent(r)} FPR" for r in rates)],
        "groups": list(groups.items()),
    }


def _flag_table(audit: Audit) -> list[list[str]]:
    titles = {d.name: d.title for d in audit.detectors}
    return [
        [
            flags.text("meaning", limit=40),
            titles.get(str(flags.values.get("detector")), _NONE),
            _count(flags.count("tested")),
            _count(flags.count("flagged")),
            _count(flags.count("true")),
            _count(flags.count("false")),
            _percent(flags.number("fdr")),
        ]
        for flags in audit.metrics.records("flags")[:_LISTED]
    ]


def _stored_table(audit: Audit) -> list[list[str]]:
    groups = audit.metrics.record("stored").record("by_multiplicity").values
    lines = []
    for label, pair in list(groups.items())[:_LISTED]:
        hit, total = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        words = "held out" if label == "0" else one_line(str(label), limit=20) + "\u00d7"
        lines.append([words, _count(hit), _count(total)])
    return lines


def _detector_notes(audit: Audit, detector: Detector) -> dict[str, Any]:
    record = detector.record
    cost = record.record("cost")
    parts = [f"{_count(cost.count(kind))} {kind}" for kind in ("forward", "jvp", "vjp")
             if cost.count(kind)]  # fmt: skip
    return {
        "title": detector.title,
        "column": one_line(detector.column, limit=60),
        "primary": detector is audit.primary,
        "statement": record.text("statement", limit=1000) or _NONE,
        "sigma": _number(record.number("sigma")),
        "level": _number(record.number("sigma_over_data_std")),
        "cost": " + ".join(parts) or _NONE,
        "seconds": _number(record.number("seconds"), 3),
        "raw": record.text("raw", limit=120) or _NONE,
    }


def _pairs(record: Record) -> list[list[str]]:
    """Any flat object as two columns of text."""
    lines = []
    for key, value in list(record.values.items())[:_LISTED]:
        shown = _number(value) if isinstance(value, float) else str(value)
        lines.append([one_line(str(key), limit=60), one_line(shown, limit=300)])
    return lines


def _data_std(model: Record, origin: Record) -> str:
    number, source = _number(model.number("data_std")), origin.text("data_std", limit=100)
    return f"{number} ({source})" if source and number != _NONE else number


def _facts(audit: Audit) -> dict[str, list[list[str]]]:
    manifest = audit.manifest
    model, data = manifest.record("model"), manifest.record("data")
    samples, origin = manifest.record("samples"), model.record("origin")
    shape = " \u00d7 ".join(str(n) for n in model.items("event_shape")[:8])
    calibrations = [
        f"{c.meaning}: {_count(c.record.count('count'))} "
        f"({c.record.text('description', limit=200) or MEANINGS[c.meaning]['against']})"
        for c in audit.calibrations
    ]
    seed = manifest.values.get("seed")
    devices = [one_line(str(device), limit=100) for device in manifest.items("devices")[:16]]
    backend = manifest.record("backend")
    passed = backend.flag("ok")
    check = "not recorded" if passed is None else "passed" if passed else "failed"
    message = backend.text("message", limit=500)
    sigma = f"{_number(model.number('sigma_min'))} to {_number(model.number('sigma_max'))}"
    facts = {
        "summary": [
            ["Model", model.text("name", limit=120) or _NONE],
            ["Data", data.text("name", limit=120) or _NONE],
            [
                "Images",
                f"{_count(int(audit.ranked.sum()))} ranked, "
                f"{_count(audit.failed) if audit.failed else 'none'} failed",
            ],
            ["Samples", f"{_count(samples.count('count'))} generated" if samples else "none"],
            ["Calibration", "; ".join(calibrations) or "none"],
            ["Detectors", f"{_count(len(audit.detectors))}, {audit.primary.title} ranks"],
            ["Seed", one_line(str(seed), limit=40) if seed is not None else _NONE],
        ],
        "model": [
            ["name", model.text("name") or _NONE],
            ["path", model.text("path") or _NONE],
            ["sha256", model.text("sha256") or _NONE],
            ["image shape", one_line(shape, limit=100) or _NONE],
            ["parameters", _count(model.count("parameters"))],
            ["standard deviation of the data", _data_std(model, origin)],
            ["noise levels (sigma)", sigma],
            ["folder", origin.text("folder") or _NONE],
            ["pipeline", origin.text("pipeline") or _NONE],
            ["network", origin.text("network") or _NONE],
            ["schedule", origin.text("schedule", limit=400) or _NONE],
            ["prediction", origin.text("prediction") or _NONE],
            *([f"sha256 of {key}", value] for key, value in _pairs(origin.record("sha256"))),
        ],
        "data": [
            ["name", data.text("name") or _NONE],
            ["rows", _count(data.count("rows"))],
            ["sha256", data.text("sha256") or _NONE],
            *([f"status {key}", value] for key, value in _pairs(data.record("status_counts"))),
        ],
        "run": [
            ["memjax", manifest.text("memjax") or _NONE],
            ["created", manifest.text("created") or _NONE],
            ["seed", one_line(str(seed), limit=40) if seed is not None else _NONE],
            ["devices", "; ".join(devices) or _NONE],
            ["numerical self-check", f"{check}: {message}" if message else check],
            *([f"seconds, {key}", value] for key, value in _pairs(manifest.record("seconds"))),
            *([f"version of {key}", value] for key, value in _pairs(manifest.record("versions"))),
        ],
    }
    return {name: [line for line in lines if line[1] != _NONE] for name, lines in facts.items()}


def _failures(audit: Audit) -> dict[str, Any]:
    words = {status.label: text for status, text in STATUS_WORDS.items()}

    def status(entry: dict[str, Any]) -> str:
        for column in ("status", f"{audit.primary.column}_status"):
            label = _entry_text(entry, column, 60)
            if label not in ("", "ok"):
                return label
        return _NONE

    return {
        "count": audit.failed,
        "left_out": max(0, audit.failed - FAILED_ROWS),
        "rows": [
            [
                _count(entry.get("row")),
                _entry_text(entry, "id", 120) or _NONE,
                status(entry),
                _entry_text(entry, "reason", 300) or words.get(status(entry), _NONE),
            ]
            for entry in audit.failures
        ],
        "statuses": [
            [title or "row", label, words.get(label, _NONE), _count(rows)]
            for title, label, rows in audit.statuses[:_LISTED]
        ],
    }


def render_page(
    audit: Audit,
    images: Sequence[str],
    nearest: Sequence[str | None],
    figures: Mapping[str, str],
) -> bytes:
    """The whole page as UTF-8.

    Args:
        audit: what was read from the folder.
        images: data URIs of the gallery's images.
        nearest: data URIs of the samples nearest to them; ``None`` where there is none.
        figures: data URIs of the figures ``ranking``, ``distribution`` and ``metrics``, as far
            as there are.

    Returns:
        HTML without scripts or references to anything outside it. Everything from the audit is
        escaped text or, for the images, a data URI; the style sheet is named by its hash.
    """
    cards = [
        _row(audit, entry)
        | {
            "image": image,
            "nearest": sample,
            "distance": _aligned(float(distance), 3),
        }
        for entry, image, sample, distance in zip(
            audit.shown, images, nearest, audit.gallery.distance, strict=True
        )
    ]
    height, width, channels = audit.gallery.images.shape[1:]
    samples = audit.manifest.record("samples")
    state = audit.manifest.text("state", limit=40)
    top = [_row(audit, entry) for entry in audit.top]
    detectors = [_detector_notes(audit, detector) for detector in audit.detectors]
    return fill(
        "page.html.jinja",
        missing=_NONE,
        incomplete=state != "completed",
        model=audit.manifest.record("model").text("name", limit=80) or "an unnamed model",
        data=audit.manifest.record("data").text("name", limit=80) or "unnamed data",
        facts=_facts(audit),
        findings=_findings(audit),
        claims=_claims(audit),
        cards=cards[:_UNFOLDED],
        more_cards=cards[_UNFOLDED:],
        pixelated=max(height, width) <= PIXELATED_SIDE,
        channels_hidden=int(channels) if channels not in (1, 3) else 0,
        samples=_count(samples.count("count")) if samples else "",
        rule=samples.text("rule", limit=80),
        figures=figures,
        grouped=bool(audit.groups),
        truth=audit.metrics.text("truth", limit=300),
        metrics=_metric_table(audit),
        flags=_flag_table(audit),
        stored=_stored_table(audit),
        calibrations=[
            {
                "meaning": c.meaning,
                "count": _count(c.record.count("count")),
                "fdr": _percent(c.record.number("fdr")),
                "description": c.record.text("description", limit=300),
                **MEANINGS[c.meaning],
            }
            for c in audit.calibrations
        ],
        primary=audit.primary.title,
        others=[d.title for d in audit.detectors if d is not audit.primary],
        top=top,
        terms=list(dict.fromkeys(term for row in top for term in row["truth"])),
        failures=_failures(audit),
        detectors=detectors,
        timed=any(detector["seconds"] != _NONE for detector in detectors),
        command=audit.manifest.text("command", limit=1000) or _NONE,
    )
