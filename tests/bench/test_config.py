"""Configs: a wrong name or value is one line with the nearest right one; nothing foreign is ever imported."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as application
from bench import errors
from bench.config import GROUPS, SETTINGS, TOP, Budget, compose, options, row_name, seeds
from bench.errors import UserError, nearest

ROOT = Path(__file__).parents[2]


def message(*overrides, folder=None):
    with pytest.raises(UserError) as error:
        compose(overrides, folder)
    text = str(error.value)
    assert "\n" not in text and "+" not in text.replace(" ".join(overrides), "")
    return text


# -- names and values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "attention=sofmax",
            'unknown attention "sofmax"; nearest: softmax. All of them: python -m bench.list attentions',
        ),
        ("task=mqr", 'unknown task "mqr"; nearest: mqar'),
        ("backbone=decodr", 'unknown backbone "decodr"; nearest: decoder, encoder'),
        ("budget=smal", 'unknown budget "smal"; nearest: small'),
        ("suite=recal", 'unknown suite "recal"; nearest: recall'),
        ("attention=null", 'unknown attention "None"; nearest: none'),
        ("attention=[softmax]", "unknown attention \"['softmax']\"; nearest: softmax"),
        ("attention=${oc.env:HOME}", 'unknown attention "'),
        ("atention=softmax", 'unknown key "atention"; nearest: attention'),
        ("task.vocabsize=3", 'unknown key "task.vocabsize"; nearest: task.vocab_size'),
        ("backbone.num_layer=3", 'unknown key "backbone.num_layer"; nearest: backbone.num_layers'),
        ("backbon.dim=3", 'unknown key "backbon.dim"; nearest: backbone.dim'),
        ("budget.max_step=3", 'unknown key "budget.max_step"; nearest: budget.max_steps'),
        ("++budget.max_step=3", '"++budget.max_step=3" would add a key; every key there is exists already'),
        ("++attention.window=3", '"++attention.window=3" would add a key'),
        ("+suite=recall", '"+suite=recall" would add a key'),
        ("+new=1", 'unknown key "new"'),
        ("~attention", '"~attention": nothing can be taken out of a run; choose another value with attention=VALUE'),
        ("attention.window=3", 'unknown key "attention.window"; nearest: attention.'),
        ("budget.max_steps=many", 'budget.max_steps must be a whole number, got "many"'),
        ("budget.max_steps=1.5", 'budget.max_steps must be a whole number, got "1.5"'),
        ("budget.max_steps=0", "budget.max_steps must be positive, got 0; nearest: 1"),
        ("budget.beta2=1", "budget.beta2 must lie in [0, 1), got 1"),
        ("budget.max_grad_norm=inf", "budget.max_grad_norm must be finite, got inf"),
        (
            "budget.learning_rates=0.1",
            "budget.learning_rates must be a list, got 0.1; type budget.learning_rates=[0.1]",
        ),
        ("budget.learning_rates=[]", "budget.learning_rates is empty; type for example"),
        ("budget.learning_rates=[0.1,0.1]", "budget.learning_rates repeats a value: [0.1, 0.1]"),
        ("budget.learning_rates=[-1]", "budget.learning_rates must be positive and finite, got -1.0"),
        ("budget.precision=bf16", 'unknown budget.precision "bf16"; nearest: bfloat16'),
        ("backbone.dim=abc", "backbone.dim must be int, got 'abc'"),
        ("attention.dropout=nan", "attention.dropout must be finite, got nan"),
        ("seed=-1", "seed must be a whole number from 0 to 2147483647 or a list of them, got -1"),
        ("seed=[]", "seed is an empty list; type for example seed=[0,1,2]"),
        ("seed=0,1", '"seed=0,1" is a sweep, add -m to the command; for a list type seed=[0,1]'),
        ("attention=softmax,none", '"attention=softmax,none" is a sweep, add -m to the command'),
        ("retry=error", "retry must be a list of words, got 'error'; type retry=[error]"),
        ("retry=[eror]", 'unknown status in retry "eror"; nearest: error'),
        ("search=first_sed", 'unknown search "first_sed"; nearest: first_seed'),
        ("device=5", "device must be a word, got 5; type device=auto"),
        ("results=null", "results must be a word, got None; type results=results"),
        ("jobs=true", "jobs must be auto or a positive whole number, got True"),
        ("plugins=os", "plugins must be a list of words, got 'os'; type plugins=[my_package]"),
        ("plugins=[../x]", 'plugins must be names of packages, got "../x"; type plugins=[my_package]'),
        ("attention", "cannot read 'attention': "),
        ("=3", 'cannot read "=3": '),
        ("attention={a", "cannot read 'attention={a': "),
        ("device=\udcff", "cannot read 'device=\\udcff': "),
        ("hydra/launcher=rya", 'unknown hydra/launcher "rya"'),
        ("hydra.run.dir=x", '"hydra.run.dir=x" is not for overrides'),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it_and_the_way_out(override, expected):
    assert message(override).startswith(expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["../x", "..", "a/../../b", "/etc/passwd", "x\0y", "", "-x", "a b", "x.yaml/../y"])
def test_a_name_cannot_be_a_path(group, name):
    text = message(f"{group}='{name}'")
    assert text.startswith((f"unknown {group} ", "cannot read "))


def edits(word):
    """Every word one edit away that is not the word itself: dropped, doubled, swapped, changed letters."""
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i] + word[i:]
        yield word[:i] + ("z" if word[i] != "z" else "q") + word[i + 1 :]
        if i + 1 < len(word) and word[i] != word[i + 1]:
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


@pytest.mark.parametrize("names", [*(tuple(options(group)) for group in GROUPS), TOP, tuple(Budget.__annotations__)])
def test_one_slip_of_the_finger_finds_the_name_among_the_nearest_three(names):
    tried = 0
    for name in names:
        for slip in edits(name):
            if slip and slip not in names:
                tried += 1
                assert name in nearest(slip, names), (slip, name)
    assert tried > 3 * len(names)


def test_keys_are_looked_for_in_the_yaml_that_a_pattern_or_suite_brings():
    for words, backbone in ((["pattern=causal_cross"], "encoder_decoder"), (["suite=hybrids"], "bare_decoder")):
        with pytest.raises(UserError, match=r'unknown key "backbone\.num_encoder_layer"') as error:
            compose([*words, "backbone.num_encoder_layer=3"])
        assert ("nearest: backbone.num_encoder_layers" in str(error.value)) == (backbone == "encoder_decoder")


def test_nearest_is_never_empty_and_at_most_three():
    assert nearest("qqqq", ["alpha", "beta"]) and len(nearest("a", ["aa", "ab", "ac", "ad"])) <= 3
    assert str(errors.unknown("thing", "x", [])) == 'unknown thing "x"'


def test_a_row_is_named_by_its_yaml_and_what_was_overridden():
    overrides = [
        "attention.window=5",
        "attention.bias=true",
        "budget.learning_rates=[1]",
        "budget.max_steps=2",
        "seed=1",
    ]
    assert row_name("attention", "sliding_window", overrides) == "sliding_window(bias=true,window=5)"
    assert row_name("budget", "smoke", overrides) == "smoke(max_steps=2)"
    assert row_name("task", "mqar", overrides) == "mqar"
    spaced, dense = (
        "task.train=[{length: 8, num_pairs: 2}]",
        "task.train=[{length:8,num_pairs:2}]",
    )  # Hydra's -m drops spaces
    assert (
        row_name("task", "mqar", [spaced])
        == row_name("task", "mqar", [dense])
        == "mqar(train=[{length:8,num_pairs:2}])"
    )


def test_seeds_are_a_list_without_repeats():
    assert seeds(3) == [3] and seeds([5, 3, 5]) == [5, 3]
    for wrong in (True, 1.0, "1", [1, None], 2**31):
        with pytest.raises(UserError):
            seeds(wrong)


def test_every_setting_has_a_default():
    assert set(compose(()).settings) == set(SETTINGS)


# -- nothing foreign -------------------------------------------------------------------------------------

TARGET = "{_target_: foreign.Marker}"
ATTENTION = "_target_: attentions.dense.softmax.Softmax\n_partial_: true\n"
HYBRID = "_target_: attentions.hybrid.hybrid\n_partial_: true\nlayers:\n"
CALLBACK = f"hydra:\n  callbacks:\n    mine: {TARGET}\n"
LOGGING = "hydra:\n  job_logging: {version: 1, root: {level: INFO}, formatters: {mine: {(): foreign.Marker}}}\n"
FACTORY = "version: 1\nroot: {level: INFO}\nformatters: {mine: {(): foreign.Marker}}\n"
GLOBAL = "# @package _global_\n"
SWEPT = f"{GLOBAL}hydra: {{mode: MULTIRUN, sweeper: {{params: {{"
OVERRIDES = [
    "attention._target_=foreign.Marker",
    "task._target_=foreign.Marker",
    "backbone._target_=foreign.Marker",
    "backbone.alternate_with._target_=foreign.Marker",
    f"backbone.alternate_with={TARGET}",
    f"attention.dropout={TARGET}",
    f"task.train=[{TARGET}]",
    f"task.train.0={{length: {TARGET}}}",
    f"++attention={TARGET}",
    f"+attention.extra={TARGET}",
    f"++attention.extra={TARGET}",
    f"+extra={TARGET}",
    "attention._target_=attentions.base.torch.hub.load",
    "attention._target_=attentions.base.torch",
    "attention._target_=attentions.base.dataclass",
    "attention._target_=bench.cell.os.system",
    "attention._target_=bench.cell.signal",
    "attention._target_=tasks..foreign.Marker",
    "attention._target_=.foreign.Marker",
    "attention._target_=attentions/../foreign.Marker",
    "attention._target_=builtins.eval",
    "attention._target_=eval",
    "attention._target_=null",
    "attention._target_=[foreign.Marker]",
    "attention._target_=bench.source._module_path",
    "++attention._args_=[foreign]",
    "attention.dropout=${oc.create:{_target_: foreign.Marker}}",
    "attention.dropout='\\${oc.create:{_target_: foreign.Marker}}'",
    "backbone.positions='\\${oc.decode:\"{_target_: foreign.Marker}\"}'",
    "hydra.launcher._target_=foreign.Marker",
    "hydra.sweeper._target_=foreign.Marker",
    f"+hydra.launcher.extra={TARGET}",
    "+hydra.launcher.extra=${attention}",
    f"+hydra.callbacks.mine={TARGET}",
    f"++hydra.callbacks={{mine: {TARGET}}}",
    f"+hydra={{callbacks: {{mine: {TARGET}}}}}",
    "+attention@hydra.callbacks.mine=softmax",
    "+hydra/callbacks=mine",
    "hydra.searchpath=[pkg://foreign]",
    "+hydra.job.env_set.PYTHONSTARTUP=foreign.py",
    "hydra/job_logging=default",
    "+hydra.job_logging.formatters.mine={(): foreign.Marker}",
    "plugins=[foreign.Marker]",
]
FILES = {
    "plain": ("attention/mine.yaml", "_target_: foreign.Marker\n"),
    "in_a_list": ("attention/mine.yaml", f"{HYBRID}  - _target_: foreign.Marker\n"),
    "deep": ("attention/mine.yaml", f"{HYBRID}  - {{_target_: attentions.hybrid.hybrid, layers: [{TARGET}]}}\n"),
    "through_an_interpolation": (
        "attention/mine.yaml",
        f"{HYBRID}  - _target_: ${{.name}}\n    name: foreign.Marker\n",
    ),
    "escaped": ("attention/mine.yaml", f"{HYBRID}  - '\\${{oc.create:{TARGET}}}'\n"),
    "arguments": ("attention/mine.yaml", f"{ATTENTION}_args_: [{TARGET}]\n"),
    "an_alias": ("attention/mine.yaml", "_target_: attentions.base.torch.load\n"),
    "an_import_of_ours": ("attention/mine.yaml", "_target_: bench.cell.json\n"),
    "not_a_mapping": ("attention/mine.yaml", "- _target_: foreign.Marker\n"),
    "python_tag": ("attention/mine.yaml", "a: !!python/object/apply:foreign.Marker []\n"),
    "its_own_plugin": ("attention/mine.yaml", f"{GLOBAL}plugins: [foreign]\nattention:\n  _target_: foreign.Marker\n"),
    "callback": ("attention/mine.yaml", f"{GLOBAL}{CALLBACK}"),
    "callback_of_a_spaced_header": ("attention/mine.yaml", f"  #  @package hydra.callbacks\nmine: {TARGET}\n"),
    "callback_from_defaults": ("attention/mine.yaml", f"defaults: [/suite@hydra.callbacks.mine: it]\n{ATTENTION}"),
    "callback_interpolated": (
        "attention/mine.yaml",
        f"{GLOBAL}hydra: ${{mine}}\nmine:\n  callbacks: {{a: {TARGET}}}\n",
    ),
    "callback_group": ("hydra/callbacks/mine.yaml", f"mine: {TARGET}\n"),
    "logging": ("attention/mine.yaml", f"{GLOBAL}{LOGGING}"),
    "logging_group": ("hydra/job_logging/mine.yaml", FACTORY),
    "launcher": ("attention/mine.yaml", f"{GLOBAL}hydra: {{launcher: {{extra: {TARGET}}}}}\n"),
    "environment": ("attention/mine.yaml", f"{GLOBAL}hydra: {{job: {{env_set: {{PYTHONPATH: .}}}}}}\n"),
    "swept": (
        "suite/mine.yaml",
        f"{SWEPT}attention._target_: foreign.Marker}}}}}}\n",
    ),
    "swept_plugins": (
        "suite/mine.yaml",
        f"{SWEPT}plugins: '[foreign]'}}}}}}\n",
    ),
    "swept_hydra": (
        "suite/mine.yaml",
        f"{SWEPT}+hydra.job_logging.formatters.a: '{{(): foreign.Marker}}'}}}}}}\n",
    ),
    "sweeper": ("suite/mine.yaml", f"{GLOBAL}hydra: {{mode: MULTIRUN, sweeper: {{_target_: foreign.Marker}}}}\n"),
    "our_name": ("attention/softmax.yaml", "_target_: foreign.Marker\n"),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`python -m bench ARGUMENTS` in this process; a module `foreign` on the path leaves a file when it is imported."""
    (tmp_path / "foreign.py").write_text(
        "from pathlib import Path\n(Path(__file__).parent / 'imported').touch()\n\n\nclass Marker:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(application, "jobs", [])
    monkeypatch.setattr(application, "run", lambda jobs: pytest.fail("it would have run"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it
    path = os.environ.get("PYTHONPATH")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        return application.main()

    yield main
    assert sys.modules.pop("foreign", None) is None and not (tmp_path / "imported").exists()
    assert os.environ.get("PYTHONPATH") == path


def refused(run, *arguments):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert str(error.value).strip() and len(" ".join(str(error.value).split())) < 600


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("multirun", [(), ("-m",)], ids=["run", "multirun"])
def test_an_override_cannot_name_foreign_code(run, override, multirun):
    refused(run, *multirun, override)


@pytest.mark.parametrize("payload", FILES)
def test_a_file_of_the_users_folder_cannot_name_foreign_code(run, tmp_path, payload):
    name, text = FILES[payload]
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    group = path.parent.name if path.parent.name in GROUPS else "attention"
    refused(run, f"--config-dir={tmp_path / 'mine'}", f"{group}={path.stem}")
    refused(run, f"--config-dir={tmp_path / 'mine'}", "-m", "seed=1", f"{group}={path.stem}")


@pytest.mark.parametrize(
    "flag", ["--config-name=mine", "--config-path=.", "-cn=mine", "-cp=.", "--experimental-rerun=x.pickle"]
)
def test_the_main_config_cannot_be_replaced(run, tmp_path, flag):
    (tmp_path / "mine.yaml").write_text(CALLBACK)
    refused(run, flag)


def test_a_link_to_a_folder_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "attention").symlink_to(tmp_path, target_is_directory=True)
    refused(run, f"--config-dir={tmp_path / 'mine'}")


def test_the_marker_shows_an_import(tmp_path, monkeypatch):
    """The control: what the tests above look for does happen when nothing refuses it."""
    (tmp_path / "foreign.py").write_text("from pathlib import Path\n(Path(__file__).parent / 'imported').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import foreign  # noqa: F401

    assert (tmp_path / "imported").exists() and sys.modules.pop("foreign")


def test_a_good_folder_of_the_user_is_taken(tmp_path):
    for name, text in {
        "attention/mine.yaml": ATTENTION + "dropout: 0.0\nbias: true\n",
        "suite/mine.yaml": f"{GLOBAL}defaults: [override /task: mqar]\nhydra: {{mode: MULTIRUN, sweeper: {{params: "
        "{attention: 'mine,softmax', attention.bias: 'true,false'}}}\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert compose(["attention=mine"], str(tmp_path)).parts["attention"]["bias"] is True
    compose(["suite=mine"], str(tmp_path))
    assert message("attention=mien", folder=str(tmp_path)).startswith('unknown attention "mien"; nearest: mine')
    assert message(folder=str(tmp_path / "nowhere")).startswith("--config-dir: there is no folder ")


# -- as a user runs it ---------------------------------------------------------------------------------


def bench(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "bench"]), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["attention=sofmax"],
            'error: unknown attention "sofmax"; nearest: softmax. All of them: python -m bench.list attentions',
        ),
        (["-m", "attention=softmax,sofmax"], 'error: unknown attention "sofmax"; nearest: softmax. All of them: '),
        (["budget.max_stps=3"], 'error: unknown key "budget.max_stps"; nearest: budget.max_steps'),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(arguments, line):
    run = bench(*arguments)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(line) and run.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["attention=sofmax"]])
def test_help_and_mistakes_do_not_import_torch(arguments):
    code = (
        "import atexit, sys; from bench import errors\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'bench.config' in sys.modules, file=sys.stderr))\n"
        "from bench import __main__ as application; errors.run(application.main)"
    )
    run = bench(*arguments, code=code)
    assert run.stderr.splitlines()[-1] == "False True" and run.returncode == (2 if "sofmax" in arguments[0] else 0)


def test_listing_all_groups_needs_no_torch():
    modules = (
        "bench.config, bench.plan, bench.store, bench.sweep, bench.isolation, bench.progress, bench.list, bench.status"
    )
    run = bench(code=f"import sys, {modules}; sys.exit('torch' in sys.modules)")
    assert run.returncode == 0, run.stderr


def test_all_payloads_are_more_than_twenty():
    assert len(OVERRIDES) + len(FILES) > 60 and len(set(itertools.chain(OVERRIDES, FILES))) == len(OVERRIDES) + len(
        FILES
    )
