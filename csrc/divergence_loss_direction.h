// Which divergence: the names that kernels on every device share.
#pragma once

namespace divqat {

enum class Direction { kStudentTeacher, kTeacherStudent, kJs };

}  // namespace divqat
