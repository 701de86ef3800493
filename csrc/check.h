// Errors as exceptions that carry the values. pybind11 turns them into RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace moreau {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace moreau
