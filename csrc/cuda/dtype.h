// Dtypes of the tensors behind void pointers in the plain C interfaces.
#pragma once

enum Dtype {
  kFloat64 = 0,
  kFloat32 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
};
