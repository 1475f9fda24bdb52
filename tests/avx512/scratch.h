// The kernels' own memory: while a call runs, what it takes with `new` ends at an unmapped page
// too.
#pragma once

#include <string>

namespace kernel_check {

void guard_scratch(bool on);

// Where an address lies beside such memory; empty if it does not.
std::string describe_scratch(const void* address);

}  // namespace kernel_check
