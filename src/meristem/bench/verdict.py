"""What the evidence says: tables of means with 95 % intervals, and plain sentences on what has an effect or none."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from meristem.bench.estimate import estimate, paired, said, table
from meristem.bench.evidence import TOLERANCE, Cell, EvidenceConfig, Group, ReadingConfig
from meristem.bench.trial import FAR
from meristem.bench.tuned import BITS, Result, rate_words, tuning_words
from meristem.evaluate.remember import N_FACTS, SPANS

MENTIONS: Final = "mentions/memory/"


def recall_distances(results: Sequence[Result[Cell]]) -> list[int]:
    """At which distances recall was measured, in bytes; none where it was not."""
    figures = [one.figures for result in results for one in result.by_seed.values()]
    places = {key.split("/")[2] for own in figures for key in own if key.startswith(MENTIONS)}
    return sorted(int(place) for place in places if place.isdigit())


def page(
    config: EvidenceConfig,
    by_table: Mapping[str, Sequence[Result[Cell]]],
    *,
    title: str,
    pictures: Mapping[str, str],
    speeds: Mapping[str, float],
) -> str:
    """The whole document. title: where, when and by which command; pictures: file names by table; speeds: tokens/s in
    training by ``table/variant``, where they were measured."""
    lines = [
        *("# Evidence", "", title, ""),
        "**Fair.** Within a table all variants read the same batches, have as many parameters as "
        f"`{config.same_size_as}` within {TOLERANCE:.0%} (the hidden width of their feed-forward layers makes up for "
        f"what they have elsewhere), and were tuned alike: {tuning_words(config)}",
        "",
        f"**Figures** are means over {len(config.seeds)} seeds ± half of a 95 % interval (Student's t). Differences "
        "are paired by seed; where their interval holds 0, that is called no effect. Bits per byte are of held-out "
        "text; less is better. *Through documents* is of held-out documents through which the memory is carried and "
        "written; *writing brings* is by how much more they cost with the memory frozen. *Recalled far* is the share "
        f"of values that are predicted where they come back beyond {FAR} attention spans ([how](notebook.md)). A "
        "session is what one reader carries. Tokens/s are of training steps of one thread, taken by turns with the "
        "table's other variants after all runs had ended, its own time.",
    ]
    for number, (name, results) in enumerate(by_table.items(), 1):
        table = config.tables[name]
        lines += ["", f"## {number}. {name}", "", table.question]
        if name in pictures:
            lines += ["", f"![{table.question}]({pictures[name]})"]
        for group, own in _grouped(results):
            measured = [result for result in own if result.is_measured]
            lines += ["", f"### {group.text}, {_budget(own[0])}", ""]
            lines += _likelihoods(config, measured, speeds) if measured else ["Not measured yet."]
            if recall_distances(measured):
                lines += ["", *_recall(measured)]
            if table.reading and measured:
                lines += _readings(table.reading, measured)
        words = list(sentences(config, name, results))
        lines += ["", *(f"- {sentence}" for sentence in words)] if words else []
    return "\n".join([*lines, ""])


def sentences(config: EvidenceConfig, table: str, results: Sequence[Result[Cell]]) -> Iterator[str]:
    """Each variant against those that the table names, what its memory and its learning bring, and what failed."""
    for group, own in _grouped(results):
        where = f"{group.text}, {group.budget}: "
        for result in own:
            yield from (where + one for one in _against(config, result, own))
        for result in own:
            yield from (where + one for one in _while_reading(result))
            reading = config.tables[table].reading
            yield from (where + one for one in (_while_learning(result, reading) if reading else ()))
        for result in own:
            for seed, outcome in result.by_seed.items():
                if outcome.failure is not None:
                    name = result.cell.variant
                    yield f"{where}`{name}` from seed {seed} ended before it was trained: {outcome.failure}"


def _against(config: EvidenceConfig, result: Result[Cell], own: Sequence[Result[Cell]]) -> Iterator[str]:
    name = result.cell.variant
    published = config.variants[name].published
    for other in _others(config, result, own):
        difference = paired(result.values(BITS), other.values(BITS))
        if difference is None:
            continue
        line = f"`{name}` against `{other.cell.variant}`: {said(difference, 'bits per byte')}"
        far = paired(result.values(f"{MENTIONS}far"), other.values(f"{MENTIONS}far"))
        if far is not None:
            line += f"; recalled far: {said(far, 'of the values', less_is_better=False)}"
        yield line + (f". Published: {published}." if published else ".")


def _while_reading(result: Result[Cell]) -> Iterator[str]:
    brings = paired(result.values("documents/memory"), result.values("documents/frozen"))
    if brings is not None and not _reads_alike(result):
        words = said(brings, "bits per byte")
        yield f"`{result.cell.variant}` with its memory written through documents, against frozen: {words}."


def _while_learning(result: Result[Cell], reading: ReadingConfig) -> Iterator[str]:
    name, (baseline, *others) = result.cell.variant, reading.learn
    for learn in others:
        for text in reading.texts:
            told = []
            for mark in reading.marks:
                ours, theirs = (result.values(f"reading/{way}/{text}/{mark}/whole") for way in (learn, baseline))
                difference = paired(ours, theirs)
                if difference is not None:
                    told.append(f"{mark:,}: {said(difference, 'bits per byte')}")
            if told:
                first = f"`{name}` with learn={learn} against {baseline}, first tokens of `{text}`"
                yield f"{first}, {'; '.join(told)}."
        again = paired(result.values(f"reading/{learn}/again"), result.values(f"reading/{learn}/first"))
        if again is not None:
            words = said(again, "bits per byte")
            yield f"`{name}` with learn={learn}, the first text again after the others, against at first: {words}."


def _likelihoods(config: EvidenceConfig, measured: Sequence[Result[Cell]], speeds: Mapping[str, float]) -> list[str]:
    table_name = measured[0].cell.group.table
    others = config.tables[table_name].against
    titles = ["variant", "parameters", "learning rate", "seeds", "bits per byte"]
    titles += [f"less `{other}`" for other in others]
    titles += ["through documents", "writing brings", "tokens read", "tokens/s", "session, bytes"]
    rows = []
    for result in measured:
        bits = result.values(BITS)
        row = [
            f"`{result.cell.variant}`",
            f"{result.cell.n_parameters:,}",
            rate_words(config, result.rate),
            str(len(bits)),
        ]
        row.append(f"**{estimate(list(bits.values())).text()}**")
        for name in others:
            other = next((one for one in measured if one.cell.variant == name and one is not result), None)
            difference = other and paired(bits, other.values(BITS))
            row.append(difference.text(sign="+") if difference else "")
        carried = result.values("documents/memory")
        brings = paired(result.values("documents/frozen"), carried)
        row += [estimate(list(carried.values())).text(), brings.text(sign="+") if brings else ""]
        n_read, n_bytes = (statistics.fmean(result.values(key).values()) for key in ("tokens", "state_bytes"))
        speed = speeds.get(f"{table_name}/{result.cell.variant}")
        row += [f"{n_read:,.0f}", "" if speed is None else f"{speed:,.0f}", f"{n_bytes:,.0f}"]
        rows.append(row)
    return table(titles, rows)


def _recall(measured: Sequence[Result[Cell]]) -> list[str]:
    """Shares by distance, of values that come back and of facts asked after; with the memory written, then frozen."""
    distances = recall_distances(measured)
    numbers = [measured[0].values(f"{MENTIONS}{distance}/n") for distance in distances]
    rows = [["values", "", *(f"{statistics.fmean(n.values()):.0f}" for n in numbers), ""]]
    asked = []
    for result in measured:
        for mode in ("memory", "frozen"):
            if mode == "frozen" and _reads_alike(result):
                continue
            name = [f"`{result.cell.variant}`", mode]
            near = [f"{statistics.fmean(result.values(f'mentions/{mode}/{d}').values()):.2f}" for d in distances]
            far = list(result.values(f"mentions/{mode}/far").values())
            rows.append([*name, *near, estimate(far).text(2)])
            asked.append([*name, *(_asked_after(result, f"remember/{mode}/{spans}") for spans in SPANS)])
    return [
        "Share of values predicted where they come back in held-out documents, by distance in bytes (up to):",
        "",
        *table(["variant", "memory", *(f"{distance:,}" for distance in distances), "far"], rows),
        "",
        f"{N_FACTS} facts told once and asked after, in wordings held out: share for which the right value is the "
        f"likeliest of the {N_FACTS} (a guess: {1 / N_FACTS:.3f}), and in brackets the greedy continuation, after so "
        "many attention spans:",
        "",
        *table(["variant", "memory", *map(str, SPANS)], asked),
    ]


def _readings(reading: ReadingConfig, measured: Sequence[Result[Cell]]) -> Iterator[str]:
    """A table for each text; in brackets the tokens since the mark before."""
    for text in reading.texts:
        is_first = text == next(iter(reading.texts))
        rows = []
        for result in measured:
            for learn in reading.learn:
                key = f"reading/{learn}/{text}"
                row = [f"`{result.cell.variant}`", learn]
                for mark in reading.marks:
                    whole, last = (list(result.values(f"{key}/{mark}{tail}").values()) for tail in ("/whole", ""))
                    row.append(f"{estimate(whole).text(3)} ({statistics.fmean(last):.3f})" if whole else "")
                if is_first:
                    again = list(result.values(f"reading/{learn}/again").values())
                    row.append(estimate(again).text(3) if again else "")
                speed = list(result.values(f"reading/{learn}/tokens_per_s").values())
                rows.append([*row, f"{statistics.fmean(speed):,.0f}" if speed else ""])
        titles = ["variant", "learn", *(f"{mark:,}" for mark in reading.marks), *(["again"] if is_first else [])]
        yield from (
            "",
            f"Bits per byte of the first so many tokens of `{text}` ({reading.texts[text]}), and in brackets of those "
            "since the mark before"
            + ("; *again*: all of them after the other texts, in one session:" if is_first else ":"),
            "",
        )
        yield from table([*titles, "tokens/s"], rows)


def _grouped(results: Sequence[Result[Cell]]) -> Iterator[tuple[Group, list[Result[Cell]]]]:
    for group, own in groupby(results, key=lambda result: result.cell.group):
        yield group, list(own)


def _others(config: EvidenceConfig, result: Result[Cell], own: Sequence[Result[Cell]]) -> list[Result[Cell]]:
    names = config.tables[result.cell.group.table].against
    return [one for name in names for one in own if one.cell.variant == name and one is not result]


def _budget(result: Result[Cell]) -> str:
    train, data = result.cell.config.train, result.cell.config.data
    length = f"{train.tokens:,} tokens" if train.tokens else f"{train.steps:,} steps" if train.steps else None
    name = result.cell.group.budget
    spent = length or f"{train.max_time:g} s of training, one thread"
    return f"equal {name} ({spent}; {data.batch_size} rows of {data.seq_len}, {data.order})"


def _reads_alike(result: Result[Cell]) -> bool:
    return result.values("documents/memory") == result.values("documents/frozen")


def _asked_after(result: Result[Cell], key: str) -> str:
    choice, greedy = (list(result.values(f"{key}{tail}").values()) for tail in ("", "/greedy"))
    return f"{estimate(choice).text(2)} ({statistics.fmean(greedy):.2f})"
