//! What the allocator does with memory that a step gives back.

/// Lets glibc keep freed memory for the next step, instead of returning it to the system, which clears
/// every page before it lends it again: steps of a small model spend a tenth of their time there. The
/// most that a process holds at once stays the same.
///
/// What the user has set for the allocator counts instead. Elsewhere than with glibc nothing is done.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const SET_BY_USER: [&str; 4] = [
            "GLIBC_TUNABLES",
            "MALLOC_TRIM_THRESHOLD_",
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TOP_PAD_",
        ];
        if SET_BY_USER
            .iter()
            .any(|name| std::env::var_os(name).is_some())
        {
            return;
        }
        /// Free bytes at the heap's end that are kept, and the smallest tensor that is not on it.
        const LARGE: libc::c_int = 1 << 30;
        /// The most that older versions take for the latter.
        const FORMERLY: libc::c_int = 1 << 25;
        // SAFETY: the call sets numbers of the allocator, under its own lock.
        unsafe {
            libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
            if libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) == 0 {
                libc::mallopt(libc::M_MMAP_THRESHOLD, FORMERLY);
            }
        }
    }
}
