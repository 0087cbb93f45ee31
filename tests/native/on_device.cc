// Making a device current for a call: which devices are set, and that no context is made elsewhere.
#include "bindings/on_device.h"

#include <cstdio>
#include <cstdlib>

using fastsample::OnDevice;

namespace {

void expect(const char* what, const std::vector<int>& set, const std::set<int>& contexts) {
  if (machine.set == set && machine.contexts == contexts) return;
  fprintf(stderr, "%s: set", what);
  for (const int device : machine.set) fprintf(stderr, " %d", device);
  fprintf(stderr, "; contexts on");
  for (const int device : machine.contexts) fprintf(stderr, " %d", device);
  fprintf(stderr, "\n");
  exit(1);
}

// A machine whose device 0 is current, with a context there or none.
void begin(bool has_context) {
  machine = Machine();
  if (has_context) machine.contexts.insert(0);
}

// Whether a call for a device that fails says so.
bool fails_on(int device) {
  try {
    const OnDevice current(device);
    throw std::runtime_error("launching the sampler: out of resources");
  } catch (const std::runtime_error& error) {
    return *error.what();
  }
}

void set_back_where_there_is_a_context() {
  begin(true);
  {
    const OnDevice current(1);
  }
  expect("with a context", {1, 0}, {0, 1});
  begin(false);
  {
    const OnDevice current(1);
  }
  expect("without a context", {1}, {1});
}

void also_after_an_error() {
  begin(true);
  if (!fails_on(1)) exit(1);
  expect("an error with a context", {1, 0}, {0, 1});
  begin(false);
  if (!fails_on(1)) exit(1);
  expect("an error without a context", {1}, {1});
}

void nothing_is_set_in_vain() {
  for (const bool has_context : {true, false}) {
    begin(has_context);
    {
      const OnDevice current(0);
    }
    expect("the current device", {}, has_context ? std::set<int>{0} : std::set<int>{});
  }
  begin(true);
  machine.fails = true;
  if (!fails_on(1)) exit(1);
  expect("no current device", {}, {0});
  begin(true);
  if (!fails_on(2)) exit(1);
  expect("no such device", {}, {0});
}

void unknown_is_no_context() {
  begin(true);
  machine.has_entry_point = false;
  {
    const OnDevice current(1);
  }
  expect("an old driver", {1}, {0, 1});
  begin(false);
  machine.contexts = {0};
  machine.knows_state = false;
  {
    const OnDevice current(1);
  }
  expect("a driver that fails", {1}, {0, 1});
}

}  // namespace

int main() {
  set_back_where_there_is_a_context();
  also_after_an_error();
  nothing_is_set_in_vain();
  unknown_is_no_context();
}
