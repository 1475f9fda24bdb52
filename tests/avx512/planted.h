// The faults that kernel_check_planted knows.
#pragma once

namespace kernel_check {

enum Fault {
  kNone,
  kLostBit,    // a population count does not see the last bit of a word
  kLostLane,   // a word of comparisons lacks its first
  kShortTail,  // the last number of a row that is no whole number of vectors stays unwritten
  kWideTail,   // such a row is read as if it were
  kLargeSum,   // a sum is a hundred-thousandth too large
  kLargeExp,   // an exponential likewise
  kFaults
};

extern int planted;  // the one that is there

}  // namespace kernel_check
