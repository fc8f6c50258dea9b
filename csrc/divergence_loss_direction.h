// The direction of the divergence, for every device.
#pragma once

namespace divqat {

enum class Direction { kStudentTeacher, kTeacherStudent, kJs };

}  // namespace divqat
