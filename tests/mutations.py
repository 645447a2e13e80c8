"""What could be wrong with a report and has to be found: its source, changed in one place each time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tunesmith.evaluation import report

HTML, CODE = "report.html.jinja", "report.py"
MUTATIONS = {  # what is wrong: the file, a part of it, what stands there instead
    "columns of base and tuned": (HTML, ">base</th>", ">tuned</th>"),
    "figures of base": (HTML, "fig(at ~ '.base', d)", "fig(at ~ '.tuned', d)"),
    "figures of tuned": (HTML, "fig(at ~ '.tuned', d)", "fig(at ~ '.base', d)"),
    "names of columns where narrow": (HTML, 'data-label="base"', 'data-label="tuned"'),
    "base and tuned of the lead": (HTML, "<b>{{ fig('metrics.0.tuned', d) }}", "<b>{{ fig('metrics.0.base', d) }}"),
    "ends of the interval": (HTML, "fig(at ~ '.low', d, true)", "fig(at ~ '.high', d, true)"),
    "ends in the picture": (HTML, "if better(m) >= 0 else", "if better(m) < 0 else"),
    "worse to the right": (HTML, "<span>← worse</span>", "<span>← better</span>"),
    "worse to the right in the verdict": (HTML, 'y="98">← worse', 'y="98">← better'),
    "intervals reversed": (HTML, "forest(m, better(m))", "forest(m, -better(m))"),
    "the verdict's interval reversed": (HTML, "better(m), 640", "-better(m), 640"),
    "half of what is detectable": (CODE, "min((m.detectable or 0.0) * scale", "min(0.5 * (m.detectable or 0.0) * scale"),
    "a point off its place": (CODE, "m.difference * scale, 1)", "m.difference * scale + 3, 1)"),
    "higher for lower": (HTML, "{{ text('better.' ~ m.metric) }} is", "{{ 'higher' if better(m) < 0 else 'lower' }} is"),
    "higher for lower, by a figure": (HTML, "text('better.' ~ m.metric)", "text('better.chrF')"),
    "higher for lower of the canary": (HTML, "-1: 'lower is better'", "-1: 'higher is better'"),
    "arrows": (HTML, "{'better': '▲', 'worse': '▼'}", "{'better': '▼', 'worse': '▲'}"),
    "colours": (HTML, "<span class=\"word {{ verdict.split()[0] }}", "<span class=\"word better"),
    "colours of intervals": (HTML, "forest {{ m.verdict.split()[0] if", "forest {{ 'worse' if"),
    "verdicts always the same": (HTML, "{{ text(at) }}</span>", "better</span>"),
    "the heading's verdict": (HTML, "{{ text('verdict') }}", "worse"),
    "the title's verdict": (HTML, "<title>{{ result.verdict or", "<title>{{ 'worse' or"),
    "order of verdicts": (CODE, '{"worse": 0, "cannot tell": 1, "better": 2}', '{"worse": 2, "cannot tell": 1, "better": 0}'),
    "another detectable difference": (HTML, "±&hairsp;{{ fig(at ~ '.detectable', d)", "±&hairsp;{{ fig(at ~ '.high', d)"),
    "rows for rows needed": (HTML, "fig(at ~ '.rows_needed')", "fig(at ~ '.rows')"),
    "a metric's rows from another": (HTML, "fig(at ~ '.rows') }}</td>", "fig('metrics.0.rows') }}</td>"),
    "metrics for the canary": (HTML, "comparisons('canary.metrics'", "comparisons('metrics'"),
    "severity": (HTML, "{{ text('diagnoses.' ~ loop.index0 ~ '.severity') }}", "error"),
    "won for lost": (HTML, "won <b>{{ fig('judge.wins')", "won <b>{{ fig('judge.losses')"),
    "won for lost, words": (HTML, "the tuned model won <b>", "the tuned model lost <b>"),
    "habits of the judge": (HTML, "('agreement', 'agreement'", "('kappa', 'agreement'"),
    "persona: tuned for base": (HTML, "the base in {{ fig('persona.base') }}", "the base in {{ fig('persona.tuned') }}"),
    "persona: of which number": (HTML, "of {{ fig('persona.probes') }}", "of {{ fig('persona.tuned') }}"),
    "answers under the other model": (HTML, "<h4>base</h4>{{ answer(path ~ '.base'", "<h4>base</h4>{{ answer(path ~ '.tuned'"),
    "samples of another number": (HTML, "'samples.' ~ loop.index0", "'samples.' ~ loop.index"),
    "asked for recited": (HTML, "fig('training_rows.recited')", "fig('training_rows.asked')"),
    "error for mean": (HTML, "fig('training_rows.belonging.0', 2)", "fig('training_rows.belonging.1', 2)"),
    "all rows for those of a code": (HTML, "fig('training_rows.findings#' ~ code)", "fig('training_rows.findings#')"),
    "sides always the same": (HTML, "{{ f.side }}</span>", "train</span>"),
    "sides of the first row": (HTML, "{{ at }}.side", "training_rows.findings.0.side"),
    "codes always the same": (HTML, "{{ code|replace('_', ' ') }}</span>", "contradicting</span>"),
    "rows numbered from one": (HTML, "(first + loop.index0)", "(first + loop.index)"),
    "rows of the second table": (HTML, "(first + loop.index0)", "loop.index0"),
    "rows are sorted by the first loss": (HTML, "{{ f.losses[-1] }}", "{{ f.losses[0] }}"),
    "prompts for answers": (HTML, "text(at ~ '.answer')", "text(at ~ '.prompt')"),
    "lines of rows always the same": (CODE, "max(0.0, v) / top", "0.5"),
    "lines of rows upside down": (CODE, "(1 - max(0.0, v) / top)", "(max(0.0, v) / top)"),
    "a flat line of validations": (CODE, '"valid": line(extremes(valid))', '"valid": line([(s, valid[0][1]) for s, _ in valid])'),
    "a line a step too late": (CODE, '"raw": line(extremes(train))', '"raw": line([(s + 1, v) for s, v in train])'),
    "a line that is not smoothed": (CODE, "line(smooth(train)[", "line(train["),
    "upside down": (CODE, "* (high - loss) /", "* (loss - low) /"),
    "ticks at half their value": (CODE, '(y(t), f"{t:g}")', '(y(t), f"{t / 2:g}")'),
    "learning rates upside down": (CODE, "* v / peak[1]", "* (1 - v / peak[1])"),
    "the best step's line": (CODE, '{"x": x(best),', '{"x": x(best - 1),'),
    "the best step's loss": (HTML, "'events:eval.' ~ chart.best.step ~ '.loss'", "'events:eval.0.loss'"),
    "losses of the step before": (HTML, "'events:step.' ~ step ~ '.loss'", "'events:step.' ~ (step - 1) ~ '.loss'"),
    "steps for epochs": (HTML, "~ step ~ '.epoch', 1)", "~ step ~ '.step', 1)"),
    "minutes for seconds": (HTML, "fig('events:done.seconds', 0) }} s", "fig('events:done.seconds', 0) }} min"),
    "a share for percent": (CODE, "100 * value if percent", "value if percent"),
    "rounded up": (CODE, 'f"{value:{sign},.{places}f}"', 'f"{value + 10**-places:{sign},.{places}f}"'),
    "another value to sort by": (CODE, "value=\"{value!r}\"", "value=\"{-value!r}\""),
    "exports that fail are deployable": (HTML, "elif e.parity.deployable", "elif not e.parity.deployable"),
    "checks that fail have passed": (HTML, "{% if c.passed %}", "{% if not c.passed %}"),
    "exports that are gone": (HTML, "'passed' if e.deployable else 'failed'", "'failed' if e.deployable else 'passed'"),
    "exports: the oldest first": (CODE, "in reversed(list(run.events(\"export\"))):", "in run.events(\"export\"):"),
    "training for validation rows": (HTML, "fig('run.json:plan.rows.valid')", "fig('run.json:plan.rows.train')"),
    "tokens that are learnt": (HTML, "fig('run.json:plan.supervised_tokens.train')", "fig('run.json:plan.tokens.train')"),
    "where a setting came from": (HTML, "text('run.json:origin.' ~ name)", "text('run.json:recipe.' ~ name)"),
}  # fmt: skip


def altered(name: str, folder: Path) -> ModuleType:
    """The report's module and template with one of MUTATIONS, or with none, in a folder of their own."""
    changed, old, new = MUTATIONS.get(name, ("", "", ""))
    for file in (HTML, CODE):
        text = Path(report.__file__).with_name(file).read_text(encoding="utf-8")
        assert file != changed or old in text
        (folder / file).write_text(text.replace(old, new) if file == changed else text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("altered_report", folder / CODE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # structs find their types by it
    spec.loader.exec_module(module)
    return module
