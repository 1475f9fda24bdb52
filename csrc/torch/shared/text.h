// A text argument of an operator (`str` in its schema).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

namespace filbert {

// The text, whose handle is freed.
//
// Operators take a StringHandle and not a std::string: torch's conversion to the latter makes a
// copy with `new` that nobody frees (torch 2.10 to 2.14), which is 48 bytes a call. They lie
// between the buffers of a forward pass, and the allocator can join none of these again.
inline std::string take_text(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

}  // namespace filbert
