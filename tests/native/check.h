// A test is a function that says what it expects; a failure prints the line and the values, and the run goes on.
#pragma once

#include <cmath>
#include <cstdio>
#include <sstream>

namespace pgolf::test {

inline int g_checks = 0, g_failures = 0;

template <class A, class B>
void check_equal(const char* file, int line, const char* text, const A& found, const B& expected) {
  ++g_checks;
  if (found == expected) return;
  ++g_failures;
  std::ostringstream words;
  words.precision(17);
  words << file << ":" << line << ": " << text << " is " << found << "; expected " << expected << ".";
  std::printf("%s\n", words.str().c_str());
}

inline void check_near(const char* file, int line, const char* text, double found, double expected, double tolerance) {
  ++g_checks;
  if (std::abs(found - expected) <= tolerance) return;  // false for NaN
  ++g_failures;
  std::printf("%s:%d: %s is %.17g; expected %.17g within %g.\n", file, line, text, found, expected, tolerance);
}

}  // namespace pgolf::test

#define CHECK_EQUAL(found, expected) pgolf::test::check_equal(__FILE__, __LINE__, #found, found, expected)
#define CHECK_NEAR(found, expected, tolerance) \
  pgolf::test::check_near(__FILE__, __LINE__, #found, found, expected, tolerance)
