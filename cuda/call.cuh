// Kernel arguments: tensors by pointer and strides, sizes, and where results go. Must match mamba_attn/ops/cuda/kernel_args.py.
#pragma once

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Fold { SIGNED = 0, POSITIVE = 1, ABSOLUTE = 2, EACH = 3 };
enum Frame { STEP = 0, READ = 1, WRITE = 2 };  // what a tensor's position is: a step, the token read or written there

// strides count elements; 0 where an axis is shared or absent
struct Tensor {
    const void* data;
    long long batch, route, group, axis, position;
    int type, frame;
};

struct Output {
    float* data;
    long long batch, route, group, axis, position;
    int add, frame;  // add: several writers meet, so add atomically to zeros
};

// a sum of many steps as high + low, |low| <= ulp(high) / 2: float32 alone loses digits over thousands of steps
struct alignas(8) Sum { float high, low; };  // aligned: one load

struct Call {
    Tensor u, delta, A, B, C, D, row_weight, col_weight;  // A: group = head, position = state; D: axis = channel
    Output y, attention;       // no data: not wanted; attention: group = channel, axis = row, position = column
    const long long *read, *write;  // (routes, length): token read and written at each step
    int batch, routes, channels, heads, groups, states, length, tokens;
    int per_head, per_group;   // channels
    int width;                 // channels of a head, where a kernel's channels are heads
    int fold, splits, products;
    float y_scale, attention_scale;
};

struct Backward {
    Call call;
    Tensor gradient;           // of y
    Output u, delta, A, B, C, D;
    float* entering;           // (batch, routes, channels, tiles, states): state before each tile, scratch
};

struct Line {
    Call call;                 // attention: position = column (of a row) or row (of a column)
    int first;                 // channel of the grid's first block
    int index, column, token;  // a step, or a token when routes merge; column: 1 reads M[:, index], else M[index, :]
};
