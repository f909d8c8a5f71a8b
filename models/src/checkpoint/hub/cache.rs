//! The cache on disk, laid out as Python's `huggingface_hub` lays it out:
//!
//! ```text
//! models--owner--name/
//!   refs/main                    the commit that `main` was when its snapshot became whole
//!   snapshots/COMMIT/unet/…      links into blobs
//!   blobs/ETAG                   contents; ETAG.incomplete on their way
//! .locks/models--owner--name/ETAG.lock
//! ```

use std::{
    fs::{self, File},
    io,
    path::{Component, Path, PathBuf},
};

use crate::checkpoint::{read, write_atomically};

/// The cache.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    /// Where it is.
    pub(super) root: PathBuf,
}

impl Cache {
    /// The folder of `owner/name`.
    pub(super) fn repo(&self, id: &str) -> PathBuf {
        self.root.join(name_of(id))
    }

    /// The snapshot that `main` points to.
    pub(super) fn main(&self, id: &str) -> Option<PathBuf> {
        let commit = read::text(&self.repo(id).join("refs/main"), 100).ok()?;
        is_commit(commit.trim()).then(|| self.snapshot(id, commit.trim()))
    }

    /// The snapshot of a commit.
    pub(super) fn snapshot(&self, id: &str, commit: &str) -> PathBuf {
        self.repo(id).join("snapshots").join(commit)
    }

    /// From now on `main` is this commit.
    pub(super) fn set_main(&self, id: &str, commit: &str) -> crate::Result<()> {
        let path = self.repo(id).join("refs/main");
        if let Some(folder) = path.parent() {
            let io = |source| crate::Error::Io { path: folder.to_owned(), source };
            fs::create_dir_all(folder).map_err(io)?;
        }
        write_atomically(&path, commit.as_bytes())
    }

    /// Where the content with that etag lies.
    pub(super) fn blob(&self, id: &str, etag: &str) -> PathBuf {
        self.repo(id).join("blobs").join(etag)
    }

    /// Waits until nobody else, Python included, fetches the content with that etag; the lock ends with the file.
    pub(super) fn lock(&self, id: &str, etag: &str) -> io::Result<File> {
        let folder = self.root.join(".locks").join(name_of(id));
        fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{etag}.lock"));
        let file = File::options().create(true).append(true).open(path)?;
        if file.try_lock().is_err() {
            tracing::info!("another process fetches the same file; waiting for it");
            file.lock()?;
        }
        Ok(file)
    }

    /// Makes `name` in the snapshot of `commit` the content with that etag.
    pub(super) fn link(&self, id: &str, commit: &str, name: &str, etag: &str) -> io::Result<()> {
        let link = self.snapshot(id, commit).join(name);
        if let Some(folder) = link.parent() {
            fs::create_dir_all(folder)?;
        }
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        #[cfg(unix)]
        {
            // From the link's folder up to the repository's.
            let up = "../".repeat(2 + name.matches('/').count());
            std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), link)
        }
        #[cfg(not(unix))]
        fs::copy(self.blob(id, etag), link).map(drop)
    }
}

fn name_of(id: &str) -> String {
    format!("models--{}", id.replace('/', "--"))
}

/// Whether it is the name of a commit: 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether it is the path of a file inside of a repository, and of none outside.
pub(super) fn is_inside(name: &str) -> bool {
    let parts = Path::new(name).components();
    let normal = parts.clone().all(|part| matches!(part, Component::Normal(_)));
    let as_written = name.split('/').all(|part| !matches!(part, "" | "." | ".."));
    normal && as_written && !name.contains(['\\', ':']) && !name.chars().any(char::is_control)
}

/// Whether it can be the name of a blob.
pub(super) fn is_etag(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=128).contains(&text.len()) && text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_known() {
        for name in ["config.json", "unet/config.json", ".gitattributes", "a b/ü..json"] {
            assert!(is_inside(name), "{name}");
        }
        for name in [
            "",
            "/etc/passwd",
            "../a",
            "a/../b",
            "a//b",
            "a/",
            "./a",
            "a\\b",
            "C:a",
            "a\0b",
            "a\nb",
            "..",
        ] {
            assert!(!is_inside(name), "{name:?}");
        }
        assert!(is_commit("0123456789abcdef0123456789abcdef01234567"));
        for commit in [
            "",
            "main",
            "../../../../../../../../../../../../../x",
            &"A".repeat(40),
            &"a".repeat(41),
        ] {
            assert!(!is_commit(commit), "{commit}");
        }
        assert!(
            is_etag("0ab9") && !is_etag("../0") && !is_etag("") && !is_etag(".") && !is_etag("a/b")
        );
    }
}
