// What drives the core in tests: driver form|layers|decode SEED N. One program, since compiling the core under sanitizers
// takes ten times as long as running any of these.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core.cpp"
#include "decode_driver.hpp"
#include "form_driver.hpp"
#include "layers_driver.hpp"

int main(int, char** words) {
  const std::string which = words[1];
  const auto drive = which == "form" ? forms::drive : which == "layers" ? layers::drive : decoders::drive;
  return drive(unsigned(std::atoi(words[2])), std::atoi(words[3]));
}
