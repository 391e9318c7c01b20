//! The status page: what a daemon does, for a person with a browser.
//!
//! Pages are made on this side and whole without a script; with it, the middle of the page is
//! exchanged every two seconds. Nothing comes from elsewhere, and nothing can be changed here.

use std::{fmt, sync::Arc, time::SystemTime};

use askama::Template;
use axum::{
    Router,
    extract::Path,
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS,
        },
    },
    response::{Html, IntoResponse as _, Response},
    routing::get,
};
use tokio_util::sync::CancellationToken;

use super::Readiness;
use crate::{config::VERSION_WITH_COMMIT, shown};

mod rates;

pub use rates::{Rates, SAMPLE_INTERVAL};

/// Only what this port itself serves, in no frame, and no form.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What a daemon shows on its status page.
pub trait StatusPage: fmt::Debug + Send + Sync {
    /// The page at a path below the root, which is the empty path; `None`: there is no such page.
    fn show(&self, path: &str) -> Option<Shown>;

    /// Called every [`SAMPLE_INTERVAL`].
    fn sample(&self);
}

/// One page.
#[derive(Debug)]
pub struct Shown {
    /// Its title.
    pub title: String,
    /// Its middle: HTML as a template has made it, in which all that others have said is escaped.
    pub body: String,
}

/// What surrounds every page.
#[derive(Debug, Template)]
#[template(path = "layout.html")]
struct Layout<'a> {
    role: &'a str,
    host: String,
    version: &'a str,
    state: String,
    now: String,
    shown: Shown,
}

/// The pages of `page`, for a daemon of the role `role`.
pub(crate) fn router(
    role: &'static str,
    page: Arc<dyn StatusPage>,
    readiness: Readiness,
) -> Router {
    let root = Arc::clone(&page);
    let ready = readiness.clone();
    let show = move |path: &str, page: &dyn StatusPage, readiness: &Readiness| match page.show(path)
    {
        Some(shown) => document(role, readiness, shown),
        None => StatusCode::NOT_FOUND.into_response(),
    };
    Router::new()
        .route("/", get(async move || show("", &*root, &ready)))
        .route(
            "/clones/{id}",
            get(async move |Path(id): Path<String>| {
                show(&format!("clones/{id}"), &*page, &readiness)
            }),
        )
        .route(
            "/assets/status.css",
            get(async || asset(CSS, include_str!("status_page/status.css"))),
        )
        .route("/assets/status.js", get(async || asset(JS, include_str!("status_page/status.js"))))
}

/// Samples until `stop`.
pub(crate) async fn sample(page: Arc<dyn StatusPage>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(SAMPLE_INTERVAL);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        page.sample();
    }
}

const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";

fn document(role: &str, readiness: &Readiness, shown: Shown) -> Response {
    let layout = Layout {
        role,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        version: VERSION_WITH_COMMIT,
        state: readiness.state().to_string(),
        now: shown::moment(SystemTime::now()),
        shown,
    };
    match layout.render() {
        Ok(html) => guarded(Html(html).into_response()),
        Err(error) => {
            tracing::error!(%error, "the status page cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    guarded(([(CONTENT_TYPE, kind)], text).into_response())
}

fn guarded(mut response: Response) -> Response {
    let headers: [(HeaderName, &'static str); 4] = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
