# SPDX-License-Identifier: Apache-2.0
"""Teams of threads (csrc/cpu/team.h), with members that come on time, late and never, in a program of their own."""

from __future__ import annotations

import subprocess

import pytest

from support import ROOT
from support.emulation import compiler

FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-pthread")
PROGRAM = r"""
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>
#include "team.h"
using mvit::Team;

template <typename Body>
void run(Team& team, int64_t items, int64_t share, bool in_parts, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  void* const context = const_cast<void*>(static_cast<const void*>(&body));
  in_parts ? team.run_parts(items, share, call, context) : team.run(items, share, call, context);
}

void want(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

int main(int, char** arguments) {
  const int members = std::atoi(arguments[1]), come = std::atoi(arguments[2]), late = std::atoi(arguments[3]);
  Team team(members);
  for (int round = 0; round < 3; ++round) {  // a team that ended begins again
    std::vector<std::thread> threads;
    std::atomic<int> thrown{0};
    {
      const Team::Lead lead(team);
      want(Team::led_here() == &team, "no team is led");
      for (int i = 1; i <= come; ++i)
        threads.emplace_back([&team, i, late] {
          std::this_thread::sleep_for(std::chrono::microseconds(late * i));
          team.serve(i);
        });
      for (int64_t items = 0; items < 700; items += 1 + items / 3)
        for (int64_t share : {1, 7})
          for (const bool in_parts : {false, true}) {
            std::vector<std::atomic<int>> seen(static_cast<std::size_t>(items));
            std::atomic<int64_t> calls{0};
            run(team, items, share, in_parts, [&](int64_t begin, int64_t end) {
              want(0 <= begin && begin < end && end <= items, "a part is not one of items");
              want(in_parts || end - begin >= share || end == items, "a part is shorter than was asked for");
              // Where the only part is everything, nothing is shared out.
              want(end - begin == items || Team::led_here() == nullptr, "a part could be shared out");
              for (int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
              ++calls;
            });
            for (const auto& times : seen) want(times == 1, "an item was not computed once");
            if (in_parts) want(calls <= members, "there are more parts than members");
          }
      try {
        run(team, 64, 1, false, [&](int64_t begin, int64_t) {
          if (begin % 2 == 1) ++thrown, throw std::runtime_error("wanted");
        });
        want(false, "an error of a part is lost");
      } catch (const std::runtime_error&) {
      }
      want(thrown == 32, "a part was left out after an error");
    }
    want(Team::led_here() == nullptr, "the team has not ended");
    for (std::thread& thread : threads) thread.join();
  }
  std::printf("right\n");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("team")
    (folder / "program.cpp").write_text(PROGRAM)
    sources = [folder / "program.cpp", ROOT / "csrc" / "cpu" / "team.cpp"]
    include = ROOT / "csrc" / "cpu"
    subprocess.run(
        [*compiler(), *FLAGS, "-I", include, *sources, "-o", folder / "program"],
        check=True,
    )
    return folder / "program"


@pytest.mark.parametrize("late", [0, 300], ids=["at once", "late"])
@pytest.mark.parametrize(("members", "come"), [(1, 0), (2, 1), (3, 2), (3, 1), (4, 0), (300, 2)])
def test_every_item_is_computed_once(program, members, come, late):
    run = subprocess.run([program, *map(str, (members, come, late))], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "right\n"), run.stdout + run.stderr
