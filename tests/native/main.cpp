// The tests of native code that need no Python, for machines that have none: an emulated one, another system.
#include <cstdio>

#include "backend.h"
#include "check.h"

namespace pgolf::test {
void test_core();
void test_cuda();
void test_quant();
void test_model();
}  // namespace pgolf::test

int main() {
  pgolf::test::test_core();
  pgolf::test::test_cuda();
  pgolf::test::test_quant();
  pgolf::test::test_model();
  std::printf("%d checks, %d failures (instruction set: %s)\n", pgolf::test::g_checks, pgolf::test::g_failures,
              pgolf::cpu_isa().c_str());
  return pgolf::test::g_failures ? 1 : 0;
}
