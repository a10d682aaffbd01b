# SPDX-License-Identifier: Apache-2.0
"""The GitHub workflows, as far as that can be seen without a runner: their YAML, the make targets and files that they
name, and that they ask for no more rights than they need."""

from __future__ import annotations

import re

import pytest
import yaml

from support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return yaml.safe_load(request.param.read_text())


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_tests_and_releases() -> None:
    assert [path.stem for path in WORKFLOWS] == ["release", "test"]


def test_every_make_target_and_script_exists(workflow: dict) -> None:
    commands = "\n".join(step.get("run", "") for step in steps(workflow))
    targets = set(re.findall(r"^\s*make ([\w-]+)", commands, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
    variables = set(re.findall(r"\b([A-Z]+)=\$\{\{", commands))
    assert all(re.search(rf"^{name} \?=", makefile, re.MULTILINE) for name in variables), variables
    assert all((ROOT / script).is_file() for script in re.findall(r"\bpython (\S+\.py)", commands))


def test_actions_have_versions_and_jobs_a_limit(workflow: dict) -> None:
    actions = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d[\d.]*|release/v\d+)", action) for action in actions), (
        actions
    )
    assert all("timeout-minutes" in job and "runs-on" in job for job in workflow["jobs"].values())
    assert all(("run" in step) != ("uses" in step) for step in steps(workflow))


def test_least_permissions_and_one_run_at_a_time(workflow: dict) -> None:
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    written = {name for name, job in workflow["jobs"].items() if job.get("permissions", {}).get("id-token") == "write"}
    assert written <= {"publish"}
    for name in written:  # on a tag only, through an environment that can ask for a person
        assert workflow["jobs"][name]["if"] == "github.ref_type == 'tag'" and workflow["jobs"][name]["environment"]
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "secrets." not in str(step)


def test_jobs_wait_for_jobs_that_exist(workflow: dict) -> None:
    assert all(job.get("needs", name) in workflow["jobs"] for name, job in workflow["jobs"].items())
