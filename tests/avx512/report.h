// Running cases and saying what became of them: one line for a kernel and copy.
#pragma once

#include <string>
#include <vector>

#include "suite.h"

namespace kernel_check {

// The copies that this processor runs and that are not the one compared with, best first.
std::vector<std::string> runnable_copies();

// Runs every stem's cases over `copies` and prints a line for each. Returns how many lines say that
// something is wrong; a stem without cases is such a line too.
int run_all(const std::vector<std::string>& copies);

}  // namespace kernel_check
