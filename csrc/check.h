// Errors as exceptions with values in their messages; RuntimeError in Python.
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
