//! What is asked of the Hub over HTTP, and how long an answer may take.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    time::{Duration, Instant},
};

use serde::Deserialize;
use ureq::{Agent, Body, config::RedirectAuthHeaders, http::Response};

use super::cache::{is_commit, is_etag, is_inside};
use crate::checkpoint::read;

/// Bytes of the longest list of files that is read.
const LISTING_LIMIT: u64 = 32 << 20;
/// Between two lines that tell how far a file has come.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Redirects that are followed inside of one host.
const REDIRECTS: usize = 5;

/// Why something could not be had.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The Hub said no, or nothing.
    Http(Box<ureq::Error>),
    /// The answer is none that a Hub gives.
    Strange(String),
    /// The connection ended before the file did, or the file is of another size than its list says.
    Short { found: u64, size: u64, error: Option<io::Error> },
    /// The disk.
    Disk(io::Error),
}

impl From<ureq::Error> for Refusal {
    fn from(error: ureq::Error) -> Self {
        Self::Http(Box::new(error))
    }
}

/// A client of one Hub.
pub(super) struct Client {
    endpoint: String,
    token: Option<String>,
    /// Follows redirects, and takes the token to its own host alone.
    agent: Agent,
    /// Follows none.
    plain: Agent,
}

/// The files of one repository at one commit.
#[derive(Deserialize)]
pub(super) struct Listing {
    pub(super) sha: String,
    pub(super) siblings: Vec<Listed>,
}

#[derive(Deserialize)]
pub(super) struct Listed {
    pub(super) rfilename: String,
    /// Bytes.
    pub(super) size: Option<u64>,
}

impl Client {
    /// `timeout` is for the connection, for the head of an answer, and for every part of a body.
    pub(super) fn new(endpoint: &str, token: Option<String>, timeout: Duration) -> Self {
        let agent = |redirects| -> Agent {
            Agent::config_builder()
                .user_agent(concat!("understudy/", env!("CARGO_PKG_VERSION")))
                // Ranges and sizes are those of the file.
                .accept_encoding("identity")
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .max_redirects(redirects)
                .max_redirects_will_error(redirects > 0)
                .timeout_resolve(Some(timeout))
                .timeout_connect(Some(timeout))
                .timeout_recv_response(Some(timeout))
                .timeout_per_read(Some(timeout))
                .timeout_per_write(Some(timeout))
                .build()
                .into()
        };
        Self {
            endpoint: endpoint.to_owned(),
            token,
            agent: agent(REDIRECTS as u32),
            plain: agent(0),
        }
    }

    fn get(
        &self,
        agent: &Agent,
        url: &str,
        range: Option<String>,
    ) -> Result<Response<Body>, ureq::Error> {
        let mut request = agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header("range", range);
        }
        request.call()
    }

    /// What `main` holds, with sizes.
    ///
    /// # Errors
    /// [`Refusal`]; also for a commit or a name that leads out of the repository.
    pub(super) fn list(&self, id: &str) -> Result<Listing, Refusal> {
        let url = format!("{}/api/models/{id}/revision/main?blobs=true", self.endpoint);
        let reply = self.get(&self.agent, &url, None)?;
        let text = read::to_end(reply.into_body().into_reader(), LISTING_LIMIT)
            .map_err(|error| Refusal::Http(Box::new(error.into())))?;
        let listing: Listing = serde_json::from_slice(&text)
            .map_err(|error| Refusal::Strange(format!("is none that a Hub gives ({error})")))?;
        if !is_commit(&listing.sha) {
            let problem =
                format!("has the commit {:?}, which is not 40 hexadecimal digits", listing.sha);
            return Err(Refusal::Strange(problem));
        }
        match listing.siblings.iter().find(|file| !is_inside(&file.rfilename)) {
            Some(file) => {
                let problem = format!("names {:?}, which is no file inside of it", file.rfilename);
                Err(Refusal::Strange(problem))
            }
            None => Ok(listing),
        }
    }

    fn url(&self, id: &str, commit: &str, name: &str) -> String {
        format!("{}/{id}/resolve/{commit}/{name}", self.endpoint)
    }

    /// The name of a file's content.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(super) fn etag(&self, id: &str, commit: &str, name: &str) -> Result<String, Refusal> {
        let mut url = self.url(id, commit, name);
        let origin = self.endpoint.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
        let first = || Some("bytes=0-0".to_owned());
        let mut reply = self.get(&self.plain, &url, first())?;
        for _ in 0..REDIRECTS {
            // Where a repository was renamed; large files are elsewhere, but their names are here.
            let elsewhere = header(&reply, "location").filter(|place| place.starts_with('/'));
            let (true, Some(place)) = (reply.status().is_redirection(), elsewhere) else { break };
            url = format!("{origin}{place}");
            reply = self.get(&self.plain, &url, first())?;
        }
        let etag = header(&reply, "x-linked-etag").or_else(|| header(&reply, "etag"));
        let etag = etag.ok_or_else(|| Refusal::Strange("has no etag".into()))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        match is_etag(&etag) {
            true => Ok(etag),
            false => Err(Refusal::Strange(format!("has the etag {etag:?}, which is no name"))),
        }
    }

    /// Fetches a file of `size` bytes into `partial`, going on where that ends.
    ///
    /// # Errors
    /// [`Refusal`]; what has come stays in `partial`, unless it is of another file.
    pub(super) fn fetch(
        &self,
        (id, commit, name): (&str, &str, &str),
        size: u64,
        partial: &Path,
    ) -> Result<(), Refusal> {
        let mut file =
            File::options().create(true).append(true).open(partial).map_err(Refusal::Disk)?;
        let mut have = file.metadata().map_err(Refusal::Disk)?.len();
        if have > size {
            file.set_len(0).map_err(Refusal::Disk)?;
            have = 0;
        }
        if have < size {
            let range = (have > 0).then(|| format!("bytes={have}-"));
            let reply = self.get(&self.agent, &self.url(id, commit, name), range)?;
            // Who knows no ranges begins anew.
            if reply.status() != 206 && have > 0 {
                file.set_len(0).map_err(Refusal::Disk)?;
                have = 0;
            }
            let announced = match header(&reply, "content-range") {
                Some(range) => range.rsplit('/').next().and_then(|all| all.parse().ok()),
                None => header(&reply, "content-length").and_then(|all| all.parse().ok()),
            };
            if let Some(announced) = announced
                && announced != size
            {
                let _ = fs::remove_file(partial);
                return Err(Refusal::Short { found: announced, size, error: None });
            }
            // One byte more than announced shows a file that does not end there.
            let body = reply.into_body().into_reader().take(size - have + 1);
            have = copy(body, &mut file, name, have, size)?;
        }
        if have > size {
            let _ = fs::remove_file(partial);
            return Err(Refusal::Strange(format!(
                "goes on after the {size} bytes that were announced"
            )));
        }
        if have < size {
            return Err(Refusal::Short { found: have, size, error: None });
        }
        file.sync_all().map_err(Refusal::Disk)
    }
}

/// Writes what comes; tells from time to time how far it is, and how far it came.
fn copy(
    mut body: impl Read,
    file: &mut File,
    name: &str,
    mut have: u64,
    size: u64,
) -> Result<u64, Refusal> {
    let mut part = vec![0; 256 << 10];
    let mut told = Instant::now();
    loop {
        let count = match body.read(&mut part) {
            Ok(0) => return Ok(have),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Refusal::Short { found: have, size, error: Some(error) }),
        };
        file.write_all(&part[..count]).map_err(Refusal::Disk)?;
        have += count as u64;
        if told.elapsed() >= LINE_EVERY {
            told = Instant::now();
            let megabytes = |bytes: u64| bytes as f64 / 1e6;
            tracing::info!("{name}: {:.1} of {:.1} MB", megabytes(have), megabytes(size));
        }
    }
}

fn header(reply: &Response<Body>, name: &str) -> Option<String> {
    reply.headers().get(name)?.to_str().ok().map(str::to_owned)
}
