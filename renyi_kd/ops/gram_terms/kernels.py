r"""Both terms of the loss and the gradient of the relation maps, in fp64, with two launches forward and one backward.

With t, s, a, b the Grams of teacher's and student's relations, image features and mask tokens at unit diagonal, and
q_t = sum t^2, q_s = sum s^2, q_j = sum (a b t)^2, q_b = sum (t s)^2 over all n^2 entries, at alpha = 2:

    L_r = log2(q_j / q_t)         L_d = log2(q_t q_s / (q_b n^2))
    dL_r/dt = 2 t (a^2 b^2 / q_j - 1 / q_t) / ln 2
    dL_d/dt = 2 t (1 / q_t - s^2 / q_b) / ln 2          dL_d/ds = 2 s (1 / q_s - t^2 / q_b) / ln 2

or, as the Cauchy-Schwarz divergence, with q_c = sum t s and m = max(q_c, 2^-20 n):

    L_d = log2(q_t q_s / m^2) + 2 (1 - q_c / m) / ln 2
    dL_d/dt = 2 (t / q_t - s / m) / ln 2                dL_d/ds = 2 (s / q_s - t / m) / ln 2

or, debiased, with q_tt = sum t^4, q_ss = sum s^4, q_b as above, u = (q_b / q_tt)^1/2 and v = (q_b / q_ss)^1/2:

    L_d = log2(q_tt q_ss / q_b^2) / 2
    dL_d/dt = 2 t (u t - s) (u t + s) / (q_b ln 2)      dL_d/ds = 2 s (v s - t) (v s + t) / (q_b ln 2)

and with K the Gram before normalisation, t_ij = K_ij r_i r_j, r_i = K_ii^-1/2, H the gradient above off the diagonal:

    dK_ij = H_ij r_i r_j          dK_ii = -r_i^2 sum_j H_ij t_ij          dx_i = 2 sum_j dK_ij x_j

The Jensen-Rényi divergence of pairs needs no Gram, but x_i = <t_i, s_i>, t_i and s_i the maps of sample i of n, p_i and
r_i one over their norms, c_i = x_i p_i r_i, weights w_i, and the teacher's maps as constants:

    L_d = sum_i w_i (1 - log2(1 + c_i^2)) / n           g_i = -2 w_i / (n (1 + c_i^2) ln 2)
    ds_i = a_i t_i + b_i s_i                            a_i = g_i c_i p_i r_i        b_i = -g_i c_i^2 r_i^2

The forward makes partial Grams of stretches of both maps, in blocks of samples, and for pairs partial x beside the
student's; one program sums them and makes terms and the matrices 2 dK; the backward mixes the maps by them. For pairs a
and b are the diagonals of two matrices in place of both 2 dK of L_d. A sample with K_ii = 0 has r_i = 0. Extra memory:
partial Grams, at most about ``PROGRAMS`` blocks of each, and nine s x s matrices.

Maps in fp16, bf16 or fp32; contiguous; few samples; alpha = 2. First derivatives only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from renyi_kd.ops.gram_terms.types import LEAST_PRODUCT

_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_PRODUCT = tl.constexpr(LEAST_PRODUCT)


@triton.jit
def _load_maps(maps_ptr, samples, places, n_samples, n_scores, stride_s):
    """Return a tile of maps in fp64, by way of fp32, which every dtype reaches."""
    inside = (samples < n_samples)[:, None] & (places < n_scores)[None, :]
    maps = tl.load(maps_ptr + samples.to(tl.int64)[:, None] * stride_s + places[None, :], mask=inside, other=0.0)
    return maps.to(tl.float32).to(tl.float64)


@triton.jit
def _store_products(
    maps_ptr, gram_ptr, rows, columns, n_samples, n_scores, stride_s, first_place, n_steps,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Store the products of two blocks of maps over n_steps stretches, and those of the blocks the other way round."""
    products = tl.zeros((BLOCK_S, BLOCK_S), tl.float64)
    for step in range(n_steps):
        places = first_place + step * BLOCK_L + tl.arange(0, BLOCK_L)
        left = _load_maps(maps_ptr, rows, places, n_samples, n_scores, stride_s)
        right = _load_maps(maps_ptr, columns, places, n_samples, n_scores, stride_s)
        products = tl.dot(left, tl.trans(right), products, input_precision="ieee", out_dtype=tl.float64)
    inside = (rows < n_samples)[:, None] & (columns < n_samples)[None, :]
    tl.store(gram_ptr + rows[:, None] * n_samples + columns[None, :], products, mask=inside)
    is_mirrored = (rows[:, None] < columns[None, :]) & inside
    tl.store(gram_ptr + columns[None, :] * n_samples + rows[:, None], products, mask=is_mirrored)


@triton.jit
def _store_pair_products(
    teacher_ptr, student_ptr, products_ptr, samples, n_samples, n_scores, first_place, n_steps,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Store the products of each sample's two maps over n_steps stretches."""
    products = tl.zeros((BLOCK_S, BLOCK_L), tl.float64)
    for step in range(n_steps):
        places = first_place + step * BLOCK_L + tl.arange(0, BLOCK_L)
        teacher = _load_maps(teacher_ptr, samples, places, n_samples, n_scores, n_scores)
        products += teacher * _load_maps(student_ptr, samples, places, n_samples, n_scores, n_scores)
    tl.store(products_ptr + samples, tl.sum(products, 1), mask=samples < n_samples)


@triton.jit(do_not_specialize=["n_samples", "n_image_parts", "n_steps", "part_stride"])
def _relation_grams_kernel(
    teacher_ptr, student_ptr, tokens_ptr, image_parts_ptr, parts_ptr, image_gram_ptr,
    n_samples, n_scores, n_token_columns, token_stride_s, n_image_parts, n_steps, part_stride,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write partial Grams of the teacher's maps, the student's or the tokens; or entries of the sum of image Grams.

    Of two blocks of samples and one stretch. For pairs the products of both models' maps are one more row of the
    student's.
    """
    n_blocks = tl.cdiv(n_samples, BLOCK_S)
    row_block, column_block = tl.program_id(1) // n_blocks, tl.program_id(1) % n_blocks
    rows, columns = row_block * BLOCK_S + tl.arange(0, BLOCK_S), column_block * BLOCK_S + tl.arange(0, BLOCK_S)
    first_place = tl.program_id(0) * n_steps * BLOCK_L
    matrix = tl.program_id(2)
    part_ptr = parts_ptr + (matrix * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * part_stride
    if matrix == 3:
        if image_parts_ptr is not None:
            size = n_samples * n_samples
            first = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * BLOCK_E
            step = tl.num_programs(0) * tl.num_programs(1) * BLOCK_E
            _sum_parts(image_parts_ptr, image_gram_ptr, n_image_parts, size, first, size, step, BLOCK_K, BLOCK_E)
    elif row_block <= column_block:
        if matrix == 0:
            if first_place < n_scores:
                _store_products(
                    teacher_ptr, part_ptr, rows, columns, n_samples, n_scores, n_scores, first_place, n_steps,
                    BLOCK_S, BLOCK_L,
                )  # fmt: skip
        elif matrix == 1:
            if first_place < n_scores:
                _store_products(
                    student_ptr, part_ptr, rows, columns, n_samples, n_scores, n_scores, first_place, n_steps,
                    BLOCK_S, BLOCK_L,
                )  # fmt: skip
                if PAIRS and row_block == column_block:
                    _store_pair_products(
                        teacher_ptr, student_ptr, part_ptr + n_samples * n_samples, rows,
                        n_samples, n_scores, first_place, n_steps, BLOCK_S, BLOCK_L,
                    )  # fmt: skip
        # Nested: the compiler must not see the pointer where there is none.
        elif tokens_ptr is not None:  # noqa: SIM102
            if first_place < n_token_columns:
                _store_products(
                    tokens_ptr, part_ptr, rows, columns, n_samples, n_token_columns, token_stride_s, first_place,
                    n_steps, BLOCK_S, BLOCK_L,
                )  # fmt: skip


@triton.jit
def _sum_parts(
    parts_ptr, gram_ptr, n_parts, part_stride, first_entry, n_entries, step,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write every step-th block of the entries of the sum of partial Grams."""
    for first in range(first_entry, n_entries, step):
        entries = first + tl.arange(0, BLOCK_E)
        total = tl.zeros((BLOCK_K, BLOCK_E), tl.float64)
        for start in range(0, n_parts, BLOCK_K):
            parts = start + tl.arange(0, BLOCK_K)
            values = tl.load(
                parts_ptr + parts.to(tl.int64)[:, None] * part_stride + entries[None, :],
                mask=(parts < n_parts)[:, None] & (entries < n_entries)[None, :], other=0.0,
            )  # fmt: skip
            total += values.to(tl.float64)
        tl.store(gram_ptr + entries, tl.sum(total, 0), mask=entries < n_entries)


@triton.jit
def _store_scales(gram_ptr, scale_ptr, samples, n_samples):
    """Store one over the norms of the samples in a Gram; 0 for a zero sample."""
    inside = samples < n_samples
    squares = tl.load(gram_ptr + samples * (n_samples + 1), mask=inside, other=0.0).to(tl.float64)
    scale = tl.where(squares == 0, 0.0, 1.0 / tl.sqrt(tl.where(squares == 0, 1.0, squares)))
    tl.store(scale_ptr + samples, scale, mask=inside)


@triton.jit
def _unit(gram_ptr, scale_ptr, rows, columns, inside, n_samples):
    """Return a block of a Gram with unit diagonal, and the scale of its rows and columns; 0 for a zero sample."""
    row_scale = tl.load(scale_ptr + rows, mask=rows < n_samples, other=0.0)
    column_scale = tl.load(scale_ptr + columns, mask=columns < n_samples, other=0.0)
    gram = tl.load(gram_ptr + rows[:, None] * n_samples + columns[None, :], mask=inside, other=0.0).to(tl.float64)
    unit = gram * row_scale[:, None] * column_scale[None, :]
    diagonal = (rows[:, None] == columns[None, :]) & inside
    # NaN stays: it is not equal to itself.
    return tl.where(diagonal & (unit == unit), 1.0, unit), row_scale, column_scale


@triton.jit
def _total(tile):
    """Return the sum of a tile."""
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _through_unit_diagonal(grad, unit, row_scale, column_scale, diagonal):
    """Return twice the gradient of the raw Gram from that of the one with unit diagonal."""
    grad = tl.where(diagonal, 0.0, grad)
    diagonal_grad = -tl.sum(grad * unit, 1) * row_scale * row_scale
    return 2.0 * tl.where(diagonal, diagonal_grad[:, None], grad * row_scale[:, None] * column_scale[None, :])


@triton.jit
def _pair_terms(products_ptr, teacher_scale_ptr, student_scale_ptr, weight_ptr, samples, n_samples):
    """Return L_d of pairs, and how much of the teacher's map and of its own the gradient of a student's map has."""
    inside = samples < n_samples
    teacher_scale = tl.load(teacher_scale_ptr + samples, mask=inside, other=0.0)
    student_scale = tl.load(student_scale_ptr + samples, mask=inside, other=0.0)
    cosine = tl.load(products_ptr + samples, mask=inside, other=0.0) * teacher_scale * student_scale
    square = cosine * cosine
    share = tl.where(inside, 1.0 / tl.cast(n_samples, tl.float64), 0.0)
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + samples, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    slope = -2.0 / _LN_2 * share / (1.0 + square)
    of_teacher = slope * cosine * teacher_scale * student_scale
    of_student = -slope * square * student_scale * student_scale
    return tl.sum(share * (1.0 - tl.log2(1.0 + square)), 0), of_teacher, of_student


@triton.jit
def _store_diagonal(matrix_ptr, values, samples, n_samples):
    """Store a matrix that is zero off its diagonal."""
    for row in range(n_samples):
        entries = tl.where(samples == row, values, 0.0)
        tl.store(matrix_ptr + row * n_samples + samples, entries, mask=samples < n_samples)


@triton.jit(do_not_specialize=["n_samples", "n_token_parts", "n_relation_parts", "part_stride", "matrix_stride"])
def _gram_terms_fwd_kernel(
    image_ptr, token_gram_ptr, parts_ptr, weight_ptr, grams_ptr,
    loss_ptr, compression_ptr, distillation_ptr, teacher_unit_ptr, student_unit_ptr, mix_ptr,
    n_samples, n_token_parts, n_relation_parts, part_stride, matrix_stride, lambda_r, lambda_d,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    FORM: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """Write loss, L_r, L_d, both unit Grams, and twice dL_r/dK_T, dL_d/dK_T and dL_d/dK_S, by blocks of rows.

    For pairs the last two are diagonal: what a student's gradient has of the teacher's map and of its own.
    """
    size = n_samples * n_samples
    token_ptr, teacher_ptr, student_ptr = grams_ptr, grams_ptr + size, grams_ptr + 2 * size
    products_ptr, given_ptr = grams_ptr + 3 * size, grams_ptr + 3 * size + n_samples
    scales_ptr = given_ptr + size
    image_scale_ptr, token_scale_ptr = scales_ptr, scales_ptr + n_samples
    teacher_scale_ptr, student_scale_ptr = scales_ptr + 2 * n_samples, scales_ptr + 3 * n_samples
    columns = tl.arange(0, BLOCK_S)
    in_columns = columns < n_samples
    n_student_entries = size
    if FORM == "jensen_renyi":
        n_student_entries += n_samples
    token_parts_ptr = parts_ptr + 2 * tl.cast(matrix_stride, tl.int64)
    if token_gram_ptr is not None:
        token_parts_ptr = token_gram_ptr
    _sum_parts(parts_ptr, teacher_ptr, n_relation_parts, part_stride, 0, size, BLOCK_E, BLOCK_K, BLOCK_E)
    _sum_parts(
        parts_ptr + matrix_stride, student_ptr, n_relation_parts, part_stride, 0, n_student_entries, BLOCK_E,
        BLOCK_K, BLOCK_E,
    )  # fmt: skip
    _sum_parts(token_parts_ptr, token_ptr, n_token_parts, part_stride, 0, size, BLOCK_E, BLOCK_K, BLOCK_E)
    # Those who read an entry are not the threads that wrote it.
    tl.debug_barrier()
    _store_scales(image_ptr, image_scale_ptr, columns, n_samples)
    _store_scales(token_ptr, token_scale_ptr, columns, n_samples)
    _store_scales(teacher_ptr, teacher_scale_ptr, columns, n_samples)
    _store_scales(student_ptr, student_scale_ptr, columns, n_samples)
    tl.debug_barrier()
    teacher_sums = tl.zeros((BLOCK_R, BLOCK_S), tl.float64)
    joint_sums = tl.zeros((BLOCK_R, BLOCK_S), tl.float64)
    target_sums = tl.zeros((BLOCK_R, BLOCK_S), tl.float64)
    student_sums = tl.zeros((BLOCK_R, BLOCK_S), tl.float64)
    both_sums = tl.zeros((BLOCK_R, BLOCK_S), tl.float64)
    for block in range(tl.cdiv(n_samples, BLOCK_R)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < n_samples)[:, None] & in_columns[None, :]
        places = rows[:, None] * n_samples + columns[None, :]
        image, _, _ = _unit(image_ptr, image_scale_ptr, rows, columns, inside, n_samples)
        token, _, _ = _unit(token_ptr, token_scale_ptr, rows, columns, inside, n_samples)
        given = image * token
        tl.store(given_ptr + places, given, mask=inside)
        teacher, _, _ = _unit(teacher_ptr, teacher_scale_ptr, rows, columns, inside, n_samples)
        tl.store(teacher_unit_ptr + places, teacher, mask=inside)
        joint = given * teacher
        teacher_sums += teacher * teacher
        joint_sums += joint * joint
        student, _, _ = _unit(student_ptr, student_scale_ptr, rows, columns, inside, n_samples)
        tl.store(student_unit_ptr + places, student, mask=inside)
        if FORM != "jensen_renyi":
            both = teacher * student
            if FORM == "debiased":
                # Each by the same operations: equal Grams give three equal sums, of which nothing is left.
                teacher, student = teacher * teacher, student * student
            target_sums += teacher * teacher
            student_sums += student * student
            if FORM == "cauchy_schwarz":
                both_sums += both
            else:
                both_sums += both * both
    q_teacher, q_joint = _total(teacher_sums), _total(joint_sums)
    compression = tl.log2(q_joint) - tl.log2(q_teacher)
    if FORM == "jensen_renyi":
        distillation, of_teacher, of_student = _pair_terms(
            products_ptr, teacher_scale_ptr, student_scale_ptr, weight_ptr, columns, n_samples
        )
        _store_diagonal(mix_ptr + size, of_teacher, columns, n_samples)
        _store_diagonal(mix_ptr + 2 * size, of_student, columns, n_samples)
    else:
        q_target, q_student, q_both = _total(target_sums), _total(student_sums), _total(both_sums)
        distillation = tl.log2(q_target) + tl.log2(q_student)
        if FORM == "cauchy_schwarz":
            least = _LEAST_PRODUCT * tl.cast(n_samples, tl.float64)
            product = tl.maximum(q_both, least)
            distillation -= 2.0 * tl.log2(product)
            distillation += 2.0 / _LN_2 * (1.0 - q_both / product)
            factor = 2.0 / _LN_2 / product
            target_ratio, student_ratio = product / q_target, product / q_student
        elif FORM == "debiased":
            distillation = 0.5 * (distillation - 2.0 * tl.log2(q_both))
            factor = 2.0 / _LN_2 / q_both
            target_ratio, student_ratio = tl.sqrt(q_both / q_target), tl.sqrt(q_both / q_student)
        else:
            distillation -= tl.log2(q_both)
            distillation -= 2.0 * tl.log2(tl.cast(n_samples, tl.float64))
            factor = 2.0 / _LN_2 / q_both
            target_ratio, student_ratio = q_both / q_target, q_both / q_student
    loss = lambda_r * compression + lambda_d * distillation
    tl.store(loss_ptr, loss.to(tl.float32).to(loss_ptr.dtype.element_ty))
    tl.store(compression_ptr, compression.to(tl.float32).to(loss_ptr.dtype.element_ty))
    tl.store(distillation_ptr, distillation.to(tl.float32).to(loss_ptr.dtype.element_ty))
    compression_factor, joint_ratio = 2.0 / _LN_2 / q_teacher, q_teacher / q_joint
    # Those who read an entry are not the threads that wrote it.
    tl.debug_barrier()
    for block in range(tl.cdiv(n_samples, BLOCK_R)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < n_samples)[:, None] & in_columns[None, :]
        diagonal = rows[:, None] == columns[None, :]
        places = rows[:, None] * n_samples + columns[None, :]
        row_scale = tl.load(teacher_scale_ptr + rows, mask=rows < n_samples, other=0.0)
        column_scale = tl.load(teacher_scale_ptr + columns, mask=in_columns, other=0.0)
        teacher = tl.load(teacher_unit_ptr + places, mask=inside, other=0.0)
        given = tl.load(given_ptr + places, mask=inside, other=0.0)
        grad = compression_factor * teacher * (given * given * joint_ratio - 1.0)
        mix = _through_unit_diagonal(grad, teacher, row_scale, column_scale, diagonal)
        tl.store(mix_ptr + places, mix, mask=inside)
        if FORM != "jensen_renyi":
            student = tl.load(student_unit_ptr + places, mask=inside, other=0.0)
            if DETACH:
                grad = tl.zeros_like(teacher)
            elif FORM == "cauchy_schwarz":
                grad = factor * (teacher * target_ratio - student)
            elif FORM == "debiased":
                # As a product: of equal Grams the difference is zero, however it is contracted.
                grad = factor * teacher * (target_ratio * teacher - student) * (target_ratio * teacher + student)
            else:
                grad = factor * teacher * (target_ratio - student * student)
            mix = _through_unit_diagonal(grad, teacher, row_scale, column_scale, diagonal)
            tl.store(mix_ptr + size + places, mix, mask=inside)
            row_scale = tl.load(student_scale_ptr + rows, mask=rows < n_samples, other=0.0)
            column_scale = tl.load(student_scale_ptr + columns, mask=in_columns, other=0.0)
            if FORM == "cauchy_schwarz":
                grad = factor * (student * student_ratio - teacher)
            elif FORM == "debiased":
                grad = factor * student * (student_ratio * student - teacher) * (student_ratio * student + teacher)
            else:
                grad = factor * student * (student_ratio - teacher * teacher)
            mix = _through_unit_diagonal(grad, student, row_scale, column_scale, diagonal)
            tl.store(mix_ptr + 2 * size + places, mix, mask=inside)


@triton.jit
def weights_of_terms(grad_loss_ptr, grad_compression_ptr, grad_distillation_ptr, lambda_r, lambda_d):
    """Return what the gradients of L_r and L_d are multiplied by."""
    compression_weight = tl.zeros((), tl.float64)
    distillation_weight = tl.zeros((), tl.float64)
    if grad_loss_ptr is not None:
        grad_loss = tl.load(grad_loss_ptr).to(tl.float32).to(tl.float64)
        compression_weight += lambda_r * grad_loss
        distillation_weight += lambda_d * grad_loss
    if grad_compression_ptr is not None:
        compression_weight += tl.load(grad_compression_ptr).to(tl.float32).to(tl.float64)
    if grad_distillation_ptr is not None:
        distillation_weight += tl.load(grad_distillation_ptr).to(tl.float32).to(tl.float64)
    return compression_weight, distillation_weight


@triton.jit
def gradient_of_map(
    scores_ptr, teacher_ptr, mix_ptr, compression_weight, distillation_weight, sample, places, n_samples, n_scores,
    BLOCK_S: tl.constexpr, IS_STUDENT: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a stretch of one relation map in fp32; the maps of its model are in fp32."""
    size = n_samples * n_samples
    if PAIRS and IS_STUDENT:
        own_ptr = mix_ptr + size + sample * (n_samples + 1)
        row = sample.to(tl.int64) * n_scores + places
        teacher = tl.load(teacher_ptr + row, mask=places < n_scores, other=0.0).to(tl.float64)
        student = tl.load(scores_ptr + row, mask=places < n_scores, other=0.0).to(tl.float64)
        grad = tl.load(own_ptr) * teacher + tl.load(own_ptr + size) * student
        grad *= distillation_weight
    else:
        mixed = tl.zeros((BLOCK_S, places.shape[0]), tl.float64)
        for first in range(0, n_samples, BLOCK_S):
            others = first + tl.arange(0, BLOCK_S)
            row_ptr, inside = mix_ptr + sample * n_samples + others, others < n_samples
            if IS_STUDENT:
                weights = distillation_weight * tl.load(row_ptr + 2 * size, mask=inside, other=0.0)
            else:
                weights = compression_weight * tl.load(row_ptr, mask=inside, other=0.0)
                if not PAIRS:
                    weights += distillation_weight * tl.load(row_ptr + size, mask=inside, other=0.0)
            mixed += weights[:, None] * _load_maps(scores_ptr, others, places, n_samples, n_scores, n_scores)
        grad = tl.sum(mixed, 0)
    return grad.to(tl.float32)


@triton.jit
def _load_mix(mix_ptr, rows, columns, n_samples):
    """Return a block of a matrix that mixes maps."""
    inside = (rows < n_samples)[:, None] & (columns < n_samples)[None, :]
    return tl.load(mix_ptr + rows[:, None] * n_samples + columns[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n_samples"])
def _gram_terms_bwd_kernel(
    teacher_ptr, student_ptr, mix_ptr, grad_loss_ptr, grad_compression_ptr, grad_distillation_ptr,
    grad_teacher_ptr, grad_student_ptr, n_samples, n_scores, lambda_r, lambda_d,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one stretch of a block of the teacher's or the student's maps.

    For pairs the matrices of L_d are diagonal, and the second of them mixes the teacher's maps into the student's
    gradient.
    """
    compression_weight, distillation_weight = weights_of_terms(
        grad_loss_ptr, grad_compression_ptr, grad_distillation_ptr, lambda_r, lambda_d
    )
    size = n_samples * n_samples
    rows = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    places = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    is_student = tl.program_id(2) == 1
    scores_ptr = teacher_ptr
    grad_ptr = grad_teacher_ptr
    first_ptr = mix_ptr
    first_weight = compression_weight
    if is_student:
        scores_ptr = student_ptr
        grad_ptr = grad_student_ptr
        first_ptr = mix_ptr + 2 * size
        first_weight = distillation_weight
    grad = tl.zeros((BLOCK_S, BLOCK_L), tl.float64)
    n_mixed = n_samples
    if PAIRS:
        if is_student:
            own = mix_ptr + rows * (n_samples + 1)
            of_teacher = distillation_weight * tl.load(own + size, mask=rows < n_samples, other=0.0)
            of_student = distillation_weight * tl.load(own + 2 * size, mask=rows < n_samples, other=0.0)
            grad += of_teacher[:, None] * _load_maps(teacher_ptr, rows, places, n_samples, n_scores, n_scores)
            grad += of_student[:, None] * _load_maps(student_ptr, rows, places, n_samples, n_scores, n_scores)
        n_mixed = tl.where(is_student, 0, n_samples)
    for first in range(0, n_mixed, BLOCK_S):
        others = first + tl.arange(0, BLOCK_S)
        weights = first_weight * _load_mix(first_ptr, rows, others, n_samples)
        if not PAIRS and not is_student:
            weights += distillation_weight * _load_mix(mix_ptr + size, rows, others, n_samples)
        maps = _load_maps(scores_ptr, others, places, n_samples, n_scores, n_scores)
        grad = tl.dot(weights, maps, grad, input_precision="ieee", out_dtype=tl.float64)
    tl.store(
        grad_ptr + rows.to(tl.int64)[:, None] * n_scores + places[None, :],
        grad.to(tl.float32).to(grad_ptr.dtype.element_ty),
        mask=(rows < n_samples)[:, None] & (places < n_scores)[None, :],
    )  # fmt: skip
