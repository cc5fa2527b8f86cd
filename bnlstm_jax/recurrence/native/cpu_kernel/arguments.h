// The arguments and results of a call.

#pragma once

#include <cstdint>

namespace {

constexpr int kGates = 4;  // forget, input, output, candidate
// With fewer input features than this, dot products at every time step compute the gradient of the
// input kernel; otherwise a matrix product over several time steps does.
constexpr int kFewFeatures = 8;
// Flags of a sequence at a time step. kValid: the step is not padding. Others: the sequence counts
// in the moments of that term.
enum Flag : uint8_t { kValid = 1, kInRecurrent = 2, kInCell = 4, kInInput = 8 };

// Where the input term comes from.
enum class Source {
  kInputs,   // [T, B, D], multiplied by a kernel
  kSymbols,  // [T, B], each selects a row of a kernel
  kTerms,    // the terms themselves, [T, B, 4H]
};

// The normalisation of a term. Statistics [T, 2, F] are mean and variance.
struct Term {
  bool normalized = false;
  float epsilon = 0;
  const float* scale = nullptr;   // [F]
  float* statistics = nullptr;    // given, or moments of the batch
  float* d_scale = nullptr;       // [F]
  float* d_statistics = nullptr;  // [T, 2, F] if given
};

struct Arguments {
  int64_t steps, batch, units;
  int64_t features;  // D, or the number of symbols, or 4H
  Source source;
  bool given;  // statistics are given; otherwise the forward pass computes them from the batch
  bool keep;   // the forward pass writes residuals for the backward pass
  const float* kernel;        // [H, 4H]
  const float* input_kernel;  // [D, 4H]
  const float* bias;          // [4H]
  const float* cell_bias;     // [H]
  const float* inputs;        // [T, B, D] or [T, B, 4H]
  const int32_t* symbols;     // [T, B]
  const uint8_t* flags;       // [T, B]; null if all rows are valid
  const float* first_cell;    // [B, H]
  const float* first_hidden;  // [B, H]
  Term input, recurrent, cell_term;
  // Outputs of the forward pass, inputs of the backward pass.
  float* hidden;          // [T, B, H]
  float* last_cell;       // [B, H]
  float* cell;            // [T, H, B]
  float* recurrent_term;  // [T, H, 4, B]
  // Gradients of the outputs, then the gradients that the backward pass computes.
  const float* d_hidden;     // [T, B, H], includes the gradient of the last carry's h
  const float* d_last_cell;  // [B, H]
  float* d_kernel;           // [H, 4H]
  float* d_input_kernel;     // [D, 4H]
  float* d_bias;             // [4H]
  float* d_cell_bias;        // [H]
  float* d_inputs;           // [T, B, D] or [T, B, 4H]
  float* d_first_cell;       // [B, H]
  float* d_first_hidden;     // [B, H]

  int64_t gates() const { return kGates * units; }
  bool dense() const { return source == Source::kInputs; }
  // Whether `recurrent_term` holds the sum of the recurrent and the input term.
  bool merged() const { return !recurrent.normalized && !input.normalized; }
};

}  // namespace
